"""One rule finds the reasoning of an answer, wherever it stands."""

import pytest

from harvest.conversations import Answer, Turn, read_row, split_answer

THOUGHT = "<|begin_of_thought|>\n\nr\n\n<|end_of_thought|>"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nr\n</think>\n\na\n", ("", "r", "a")),
        ("r\n</think>\na", ("", "r", "a")),
        ("b\n<think>r</think>a", ("b", "r", "a")),
        (f"{THOUGHT}\n\n<|begin_of_solution|>\n\na\n\n<|end_of_solution|>", ("", "r", "a")),
        (f"{THOUGHT}\n\na", ("", "r", "a")),
        (f"{THOUGHT}<|begin_of_solution|>a", ("", "r", "a")),
        (f"b{THOUGHT}", ("b", "r", "")),
        ("r<|end_of_thought|>a", ("", "r", "a")),
        ("<think>r</think>a<think>s</think>c", ("", "r\n\ns", "a\n\nc")),
        ("b<think>r</think>\n<think>s</think>c", ("b", "r\n\ns", "c")),
        ("r</think>a<think>s</think>", ("", "r\n\ns", "a")),
        ("<think>r</think>a<think>r</think>a", ("", "r", "a\n\na")),
        ("<think>\n\n</think>\n\na", ("", "", "a")),
        ("</think>a", ("", "", "a")),
        (" a ", ("", None, " a ")),
    ],
)
def test_where_reasoning_stands(text, parts):
    assert split_answer(text) == Answer(*parts)


@pytest.mark.parametrize(
    "text",
    [
        "<think>r",
        "a<think>",
        "<think>r<think>s</think></think>a",
        "r</think>s</think>a",
        "<think>r</think>a<think>s",
        "<think>r<|end_of_thought|>a",
        "<|begin_of_thought|>r</think>a",
        "<|begin_of_solution|>a<|end_of_solution|>",
    ],
)
def test_tags_that_do_not_pair_stay_text(text):
    assert split_answer(text) == Answer("", None, text, malformed=True)
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    reading = read_row("conversation", {"conversation": conversation})
    assert reading.turns[1] == Turn("assistant", text)
    assert reading.malformed


def spoken(**turn) -> Turn:
    conversation = [{"role": "user", "content": "<think>q</think>"}, {"role": "assistant", **turn}]
    first, second = read_row("conversation", {"conversation": conversation}).turns
    assert first == Turn("user", "<think>q</think>")  # of an answer alone
    return second


def test_fields_of_a_turn():
    for field in ("reasoning_content", "thinking", "reasoning"):
        assert spoken(**{field: "\nr\n"}, content="a ") == Turn("assistant", "a ", "r")
        assert spoken(**{field: "r"}, content=None) == Turn("assistant", "", "r")
        assert spoken(**{field: " "}, content="a") == Turn("assistant", "a")
        assert spoken(**{field: True}, content="a") == Turn("assistant", "a")  # a switch
    assert spoken(reasoning_content="r", content="<think>\nr\n</think>a") == Turn("assistant", "a", "r")
    assert spoken(reasoning_content="r", content="b<think>s</think>a") == Turn("assistant", "a", "r\n\ns", "b")
    assert spoken(reasoning_content="r", content="a<think>") == Turn("assistant", "a<think>", "r")
    parts = [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]
    assert spoken(content=parts) == Turn("assistant", "a", "r")


@pytest.mark.parametrize(
    ("reasoning", "solution", "answer"),
    [
        (" r\n", "s", Turn("assistant", "s", " r\n")),
        ("<think>\nr\n</think>", "s", Turn("assistant", "s", "r")),
        ("<think>r</think>\n\ns", "s", Turn("assistant", "s", "r")),
        ("<think>r</think>s", "", Turn("assistant", "s", "r")),
        ("b<think>r</think>", None, Turn("assistant", "", "r", "b")),
        ("r</think>", "s", Turn("assistant", "s", "r")),
        (THOUGHT, "s", Turn("assistant", "s", "r")),
        ("r", "<think>r</think>s", Turn("assistant", "s", "r")),
        ("r", "b<think>t</think>s", Turn("assistant", "s", "r\n\nt", "b")),
        ("<think>r", "s", Turn("assistant", "s", "<think>r")),
    ],
)
def test_tags_in_the_column_of_the_reasoning(reasoning, solution, answer):
    row = {"problem": "p", "deepseek_reasoning": reasoning, "deepseek_solution": solution}
    reading = read_row("reasoning", row)
    assert reading.turns == [Turn("user", "p"), answer]
    assert reading.malformed == (reasoning == "<think>r")
