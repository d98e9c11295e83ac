"""Conversations with everything that text does to a tokenizer or a template."""

from harvest.conversations import Turn

CODE = "def f(x):\n    if x > 0:\n        return  x\n\treturn -x\n\n\n# done    \n"
CLEAN: dict[str, list[Turn]] = {
    "two sides": [Turn("user", "What is 17 + 25?"), Turn("assistant", "It is 42.")],
    "system": [Turn("system", "Be brief."), Turn("user", "the sum"), Turn("assistant", "is even")],
    "several turns": [
        Turn("user", "wait"),
        Turn("assistant", "Yes."),
        Turn("user", "so the sum of two"),
        Turn("assistant", "numbers is even"),
    ],
    "ends with a user": [Turn("user", "wait"), Turn("assistant", "Yes."), Turn("user", "so")],
    "tools": [
        Turn("user", "look"),
        Turn("assistant", "I look it up."),
        Turn("tool", "17"),
        Turn("tool", "25 of them"),
        Turn("assistant", "42"),
    ],
    "reasoning": [Turn("user", "the sum"), Turn("assistant", "is even", "Let me check this.\n\nYes.")],
    "reasoning in each turn": [
        Turn("user", "the sum"),
        Turn("assistant", "is even", "wait."),
        Turn("user", "and then"),
        Turn("assistant", "42!", "Then what?\nYes."),
    ],
    "reasoning alone": [Turn("user", "the sum"), Turn("assistant", "", "Let me check.")],
    "no reasoning though asked": [Turn("user", "the sum"), Turn("assistant", "is even", "")],
    "code": [Turn("user", CODE), Turn("assistant", f"```python\n{CODE}```")],
    "white space": [Turn("user", "  \n two blanks  "), Turn("assistant", "\n\nso\n\n ", "  hmm \n\n")],
    "runs of blanks": [Turn("user", "a" + 8 * " " + "b" + 17 * " "), Turn("assistant", 4 * " " + "c\t\t\n" + 16 * " ")],
    "carriage returns": [Turn("user", "OK.\r\nThen?\r\n"), Turn("assistant", "Yes.\r\n\r\n")],
    "other scripts": [
        Turn("user", "東京 ú über é e\u0301 ﬁ Ⅳ 🤗👩‍👩‍👧"),
        Turn("assistant", "<h1>ú</h1> naïve — 😀\u200d"),
    ],
    "half spellings": [Turn("user", "<|im_"), Turn("assistant", "end|> <| <start_of", "think> </thin")],
    "numbers": [Turn("user", "3.14159 1000000 ½ ٣"), Turn("assistant", "17+25=42!!!?")],
}
# Each content spells protected tokens: whole, twice, beside one another, within words, and where a marker begins.
SPELT: dict[str, list[Turn]] = {
    "a marker": [Turn("user", "a <|im_end|> b"), Turn("assistant", "c<|im_start|>system\nd")],
    "tags": [Turn("user", "what is </think>?"), Turn("assistant", "so <think>x</think> y", "a </think> b")],
    "other models' markers": [
        Turn("user", "<｜User｜><｜Assistant｜> <start_of_turn>model\n<|eot_id|>"),
        Turn("assistant", "x<|endoftext|>", "<|endoftext|><|endoftext|>"),
    ],
    "across a boundary": [Turn("user", "x <|endoftext|"), Turn("assistant", "><|im_end|", "<|im_end|><|im_")],
}
