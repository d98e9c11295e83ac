"""Answers of the tiny model as a source of conversations: what is written, what is kept, what is refused."""

import json
from pathlib import Path

import pytest
from conftest import pipeline
from transformers import LlamaConfig, XLNetConfig

from evaluate.engine import Completion
from evaluate.journal import Journal
from evaluate.prompts import check_lengths, position_limit
from evaluate.steering import read_prompts
from evaluate.traces import FIELDS, conversation
from harvest.config import Source
from harvest.conversations import read_row
from harvest.files import UserError
from harvest.sources import open_source

PROMPTS = ("--prompt", "wait therefore the sum", "--prompt", "numbers")
OPTIONS = ("--samples", "2", "--max-new-tokens", "6", "--temperature", "1", "--slots", "3")


def generated(to: str, *more: str) -> list[dict]:
    ran = pipeline("generate", "--to", to, *PROMPTS, *OPTIONS, *more)
    assert ran.status == 0, ran.out
    assert ran.out.splitlines()[-1] == to
    assert not Path(f"{to}.partial").exists()
    return [json.loads(line) for line in Path(to).read_text().splitlines()]


def test_answers_are_a_source_of_conversations(run_folder):
    lines = generated("a.jsonl")
    assert [(line["prompt"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {line["conversation"][0]["content"] for line in lines} == set(PROMPTS[1::2])
    assert lines[0]["conversation"] != lines[1]["conversation"]
    assert all(line["tokens"] == 6 or line["ended"] for line in lines)
    source = Source(name="own", path="a.jsonl", rows="conversation", share=1.0)
    rows = open_source(source, None, offline=True).rows
    readings = [read_row("conversation", row) for row in rows.take(range(len(rows)), ["conversation"])]
    assert [reading.turns[1].content for reading in readings] == [line["conversation"][1]["content"] for line in lines]


def test_features_change_what_is_written(run_folder):
    plain, steered = generated("a.jsonl"), generated("b.jsonl", "--feature", "3:add:0", "--feature", "5:add:9")
    same = generated("c.jsonl", "--feature", "5:add:0")
    assert plain == same != steered


def test_it_goes_on_where_it_was_stopped(run_folder, monkeypatch):
    generated("whole.jsonl")
    lines = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    written = []

    class Stopped(Journal):
        def add(self, value: dict) -> None:
            written.append(value)
            if len(written) == 4:  # behind what was asked and two answers
                raise KeyboardInterrupt
            super().add(value)

    with monkeypatch.context() as patch:
        patch.setattr("evaluate.traces.Journal", Stopped)
        assert pipeline("generate", "--to", "b.jsonl", *PROMPTS, *OPTIONS).status == 130
    partial = Path("b.jsonl.partial")
    asked, one, two = partial.read_text().splitlines()
    first, second = ({k: v for k, v in json.loads(line).items() if k != "asked"} for line in (one, two))
    assert first in lines
    marked = second | {"tokens": 77}
    cut = f"{asked}\n{one}\n{json.dumps(marked | {'asked': None})}\n{one[:20]}"  # half a line, by a kill
    partial.write_text(cut)
    assert generated("b.jsonl") == [marked if line == second else line for line in lines]
    partial.write_text(cut + "\n")
    assert "line 4 is damaged; delete it, and its answer is written anew" in refused("b2.jsonl", partial)
    Path("c.jsonl.partial").write_text(f"{asked}\n")  # a kill before the first answer
    assert generated("c.jsonl") == lines


def refused(to: str, partial: Path) -> str:
    Path(f"{to}.partial").write_bytes(partial.read_bytes())
    ran = pipeline("generate", "--to", to, *PROMPTS, *OPTIONS)
    assert ran.status == 1
    return ran.out


def test_what_is_refused_leaves_no_file(run_folder):
    ran = pipeline("generate", "--to", "a.jsonl", *PROMPTS, "--max-new-tokens", "9999")
    assert ran.status == 1 and "more than the model's" in ran.out
    assert not list(Path().glob("a.jsonl*"))


def test_what_was_begun_otherwise_or_is_there_is_left_as_it_is(run_folder):
    begun = json.dumps({**dict.fromkeys(FIELDS), "asked": {"seed": 1}}) + "\n"
    Path("a.jsonl.partial").write_text(begun)
    ran = pipeline("generate", "--to", "a.jsonl", *PROMPTS, *OPTIONS)
    assert ran.status == 1 and "a.jsonl.partial: was begun with another seed (1 then, 0 now)" in ran.out
    assert Path("a.jsonl.partial").read_text() == begun
    Path("a.jsonl").write_text("mine")
    ran = pipeline("generate", "--to", "a.jsonl", *PROMPTS)
    assert ran.status == 1 and "--to: a.jsonl: exists; give another file, or delete it" in ran.out
    assert Path("a.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        (("--to", "a.jsonl"), 2, "no prompt: give --prompt TEXT or --prompts FILE"),
        (("--to", "a.txt", *PROMPTS), 2, "--to: a.txt: a name that ends in .jsonl is meant"),
        (("--to", "no/a.jsonl", *PROMPTS), 2, "--to: no/a.jsonl: there is no folder no"),
        (
            ("--to", "a.jsonl", *PROMPTS, "--samples", "2", "--temperature", "0"),
            2,
            "all answers to a prompt are the same",
        ),
        (("--to", "a.jsonl", *PROMPTS, "--feature", "1:sing"), 2, "'sing' is no operation"),
        (("--to", "a.jsonl", *PROMPTS, "--feature", "99999"), 1, "--feature: 99999: the SAE has"),
        (("--to", "a.jsonl", *PROMPTS, "--feature", "1", "--hook", "x"), 2, "--hook: 'x': these settings have"),
        (("--to", "a.jsonl", "--prompt", " "), 1, "prompt 1 of 1 is empty"),
        (("--to", "a.jsonl", "--prompts", "none.txt"), 1, "none.txt: cannot be read: No such file"),
    ],
)
def test_bad_options_are_named(run_folder, given, status, said):
    ran = pipeline("generate", *given)
    assert ran.status == status and said in ran.out, ran.out
    assert not Path("a.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "ended", "is_thinking", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nfour", True, False, "hm", "four"),
        ("hm\n</think>\n\nfour", True, True, "hm", "four"),  # the template wrote the opening tag
        ("hm, and so", False, True, "hm, and so", ""),  # cut off within its reasoning
        ("<think>\nhm, and so", False, False, "hm, and so", ""),
        ("four", True, False, None, "four"),
        ("four and", False, False, None, "four and"),
    ],
)
def test_reasoning_is_in_its_place(text, ended, is_thinking, reasoning, content):
    turns = conversation("2 + 2?", Completion(text, [1], ended, 1, 0), is_thinking)
    read = read_row("conversation", {"conversation": turns}).turns
    assert (read[0].content, read[1].reasoning, read[1].content) == ("2 + 2?", reasoning, content)


def test_prompts_of_several_lines_come_from_json_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "c\u2028d", "answer": 4}\n', encoding="utf-8")
    assert read_prompts(path) == ("a\nb", "c\u2028d")
    path.write_text('{"prompt": "a"}\n{"problem": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: has no prompt"):
        read_prompts(path)


def test_a_model_without_a_limit_of_positions():
    """XLNet says -1, which is no length that a context has to be below."""
    assert position_limit(XLNetConfig()) is None
    assert position_limit(LlamaConfig(max_position_embeddings=12)) == 12
    check_lengths([[1] * 8], 4, 12)
    check_lengths([[1] * 8], 400, None)
    with pytest.raises(UserError, match="prompt 1 of 1 has 8 tokens; with 5 new ones that is more than the model's 12"):
        check_lengths([[1] * 8], 5, 12)
