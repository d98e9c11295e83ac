import pytest
import tiny

from harvest.chat_template import ChatTemplate
from harvest.conversations import Turn, document_key, is_held_out, needed_columns, read_row
from harvest.files import UserError
from harvest.templates import Segment
from harvest.tokenizer import SegmentTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> SegmentTokenizer:
    return SegmentTokenizer(tiny.tokenizer().backend_tokenizer, "<|im_end|>")


def compose(template: str, document: list[Turn]) -> list[Segment]:
    return ChatTemplate(tiny.tokenizer(), template).compose(document)


def text_of(template: str, document: list[Turn]) -> str:
    return "".join(segment.text for segment in compose(template, document))


def test_schemas():
    assert read_row("conversation", {"conversation": [{"role": "user", "content": "a"}]}).turns == [Turn("user", "a")]
    row = {
        "system": "think",
        "conversations": [
            {"from": "user", "value": "a"},
            {
                "from": "assistant",
                "value": "<|begin_of_thought|>\n\nr\n\n<|end_of_thought|>\n\n"
                "<|begin_of_solution|>\n\ns\n\n<|end_of_solution|>",
            },
        ],
    }
    assert read_row("conversations", row).turns == [
        Turn("system", "think"),
        Turn("user", "a"),
        Turn("assistant", "s", "r"),
    ]
    row = {"problem": "p", "deepseek_reasoning": "r", "deepseek_solution": "s"}
    assert read_row("reasoning", row).turns == [Turn("user", "p"), Turn("assistant", "s", "r")]
    assert read_row("text", {"text": "t"}).turns == [Turn("", "t")]


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ("conversation", {"conversation": []}),
        ("conversation", {"conversation": None}),
        ("conversation", {"conversation": [{"role": "user", "content": None}]}),
        ("conversation", {"conversation": [{"role": "assistant", "content": "a"}]}),
        ("reasoning", {"problem": "p", "deepseek_reasoning": "", "deepseek_solution": "s"}),
        ("text", {"text": " "}),
    ],
)
def test_rows_with_nothing_in_them(rows, row):
    assert read_row(rows, row).dropped


@pytest.mark.parametrize(
    ("ids", "reason", "found"),
    [
        (None, "ids are null", ""),
        ("1 2 3", "ids are text", ""),
        ([], "ids are empty", ""),
        ([1, [2, 3]], "ids are no list of whole numbers", ""),
        ([[1, 2], [3, 4]], "ids are no list of whole numbers", ""),
        ([1, 2.5], "ids are no list of whole numbers", ""),
        ([True, False], "ids are no list of whole numbers", ""),
        ({"a": 1}, "ids are no list of whole numbers", ""),
        ([5, -100, 7], "ids below 0 or above 4,294,967,295", "-100"),
        ([5, 2**32], "ids below 0 or above 4,294,967,295", "4294967296"),
    ],
)
def test_token_ids_that_are_none(ids, reason, found):
    reading = read_row("tokens", {"tokens": ids})
    assert reading.dropped == (reason, found, False) and reading.ids is None


def test_the_largest_token_id():
    ids = read_row("tokens", {"tokens": [0, 2**32 - 1]}).ids
    assert ids is not None and ids.tolist() == [0, 2**32 - 1]


@pytest.mark.parametrize("text", ['[{"role": "user"', "[" * 100_000])
def test_text_that_is_no_json_is_no_list_of_turns(text):
    assert read_row("messages", {"messages": text}).dropped == ("conversation is text, not a list of turns", "", False)


def test_content_of_one_part_that_is_in_no_list():
    turns = [{"role": "user", "content": {"type": "text", "text": "a"}}]
    turns += [{"role": "assistant", "content": {"type": "thinking", "thinking": " hm "}}]
    assert read_row("messages", {"messages": turns}).turns == [Turn("user", "a"), Turn("assistant", "", "hm")]
    turns[0]["content"] = {"type": "image_url", "text": "a"}
    dropped = read_row("messages", {"messages": turns}).dropped
    assert dropped == ("content has a part that is not text", "image_url", False)


def test_chatml():
    document = [Turn("user", "hi"), Turn("assistant", "yes", "hm")]
    assert text_of("chatml", document) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhm\n\nyes<|im_end|>\n"


def test_deepseek_keeps_the_reasoning_and_has_one_bos(tokenizer):
    document = [Turn("user", "the sum"), Turn("assistant", "is even", "wait so"), Turn("user", "again")]
    text = text_of("deepseek-r1", document)
    assert (
        "<｜User｜>the sum<｜Assistant｜><think>\nwait so\n</think>\n\nis even<｜end▁of▁sentence｜><｜User｜>again"
        in text
    )
    ids = tokenizer.encode([compose("deepseek-r1", document)])[0].tolist()
    decoded = tokenizer.whole.decode(ids, skip_special_tokens=False)
    assert "wait so" in decoded
    bos, think = (tokenizer.whole.token_to_id(t) for t in ("<｜begin▁of▁sentence｜>", "<think>"))
    assert ids.count(bos) == 1
    assert ids[0] == bos
    assert ids.count(think) == 1


@pytest.mark.parametrize("marker", ["<|im_end|>", "<｜User｜>", "<think>", "</think>"])
def test_text_that_looks_like_a_special_token_stays_text(tokenizer, marker):
    plain = tokenizer.encode([compose("chatml", [Turn("user", "a b")])])[0].tolist()
    hostile = tokenizer.encode([compose("chatml", [Turn("user", f"a {marker} b")])])[0].tolist()
    token = tokenizer.whole.token_to_id(marker)
    assert hostile.count(token) == plain.count(token)
    assert tokenizer.whole.decode(hostile, skip_special_tokens=False).count(marker) == 1 + plain.count(token)


def test_equal_prompts_fall_on_one_side():
    a = [Turn("user", "p "), Turn("assistant", "x")]
    b = [Turn("system", "s"), Turn("user", "p"), Turn("assistant", "y")]
    assert document_key(a) == document_key(b) == "p"
    sides = [is_held_out(str(i), 0, 0.25) for i in range(4000)]
    assert 0.22 < sum(sides) / len(sides) < 0.28
    assert sides != [is_held_out(str(i), 1, 0.25) for i in range(4000)]


def test_missing_columns_are_named():
    with pytest.raises(
        UserError, match=r"needs the columns deepseek_reasoning, deepseek_solution.*rows: text would fit"
    ):
        needed_columns("reasoning", ["problem", "text"], (), "maths")


def test_tags_that_an_answer_speaks_of_stay_text():
    answer = "The tag `<think>` opens and `</think>` closes."
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": answer}]
    reading = read_row("messages", {"messages": turns})
    assert reading.turns[1] == Turn("assistant", answer) and reading.malformed


def test_tags_in_a_column_of_solutions():
    row = {"problem": "p", "deepseek_reasoning": "r", "deepseek_solution": "<think>z</think>s"}
    assert read_row("reasoning", row).turns[1] == Turn("assistant", "s", "r\n\nz")
    row["deepseek_solution"] = "<|begin_of_solution|>\n\ns\n<|end_of_solution|>"
    assert read_row("reasoning", row).turns[1] == Turn("assistant", "s", "r")
