import errno
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import zarr
from conftest import contents, only, pipeline

from harvest.config import SampleConfig, Source
from harvest.conversations import document_key, read_row
from harvest.sampling import contexts_by_source
from harvest.sources import OpenedSource, open_source


def source(path: Path, rows: str) -> Source:
    return Source(name="s", path=str(path), rows=rows, share=1)


def taken(opened: OpenedSource) -> list[dict]:
    """All rows of a source."""
    return opened.rows.take(range(len(opened.rows)), opened.columns)


@pytest.mark.parametrize(("rows", "made"), [("conversation", tiny.conversations), ("reasoning", tiny.solutions)])
def test_json_lines_and_parquet_give_the_same_turns(tmp_path, rows, made):
    tiny.write_jsonl(tmp_path / "a.jsonl", made(10))
    datasets.Dataset.from_list(made(10)).to_parquet(tmp_path / "b.parquet")
    read = [open_source(source(tmp_path / name, rows), None, offline=True) for name in ("a.jsonl", "b.parquet")]
    documents = [[read_row(rows, row) for row in taken(opened)] for opened in read]
    assert documents[0] == documents[1] == [read_row(rows, row) for row in made(10)]


def test_splits_hold_whole_shards_of_their_shares(finished):
    group = zarr.open_group(only(finished, "runs/sample/*/contexts"), mode="r")
    assert group["train/tokens"].shape == (96, 16)
    assert group["holdout/tokens"].shape == (32, 16)
    assert np.bincount(group["train/source"][:]).tolist() == [48, 48]
    assert group.attrs["sources"] == ["chat", "reasoning"]


def test_no_prompt_is_on_both_sides(finished):
    group = zarr.open_group(only(finished, "runs/sample/*/contexts"), mode="r")
    keys = {}
    for split in ("train", "holdout"):
        found = set()
        for number, (rows, name) in enumerate((("conversation", "chat"), ("reasoning", "reasoning"))):
            lines = (finished / "assets" / f"tiny-{name}.jsonl").read_text().splitlines()
            chosen = group[f"{split}/document"][:][group[f"{split}/source"][:] == number]
            found |= {document_key(read_row(rows, json.loads(lines[i])).turns) for i in np.unique(chosen)}
        keys[split] = found
    assert keys["train"]
    assert keys["holdout"]
    assert not keys["train"] & keys["holdout"]


def test_a_context_holds_what_its_documents_say(finished):
    """Tokens of a document, gathered over the contexts of its split, are found in its text in order."""
    group = zarr.open_group(only(finished, "runs/sample/*/contexts"), mode="r")
    tokenizer = tiny.tokenizer()
    tokens, document, origin = (group[f"train/{name}"][:] for name in ("tokens", "document", "source"))
    chat = (finished / "assets" / "tiny-chat.jsonl").read_text().splitlines()
    row = int(np.flatnonzero(origin == 0)[0])
    number = int(document[row][0])
    text = tokenizer.decode(tokens[row][document[row] == number], skip_special_tokens=True)
    whole = "".join(f"{t['role']}\n{t['content']}\n" for t in json.loads(chat[number])["conversation"])
    assert text.strip("�") in whole


def test_the_same_settings_give_the_same_bytes(finished, fresh_folder):
    assert pipeline("sample").status == 0
    again = contents(only(fresh_folder, "runs/sample/*/contexts"))
    assert again == contents(only(finished, "runs/sample/*/contexts"))


def test_a_budget_that_is_no_whole_number_of_shards_says_what_is_used(fresh_folder):
    ran = pipeline("sample", "sample.train_tokens=1500")
    assert ran.status == 0
    assert "1,500 is no whole number of shards; 1,280 are used (5 whole shards of 256)" in ran.out


def test_what_the_models_template_does_by_itself_is_said(fresh_folder):
    path = Path("assets/tiny-llama/tokenizer_config.json")
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}), encoding="utf-8")
    said = pipeline("sample", "sample.template=model").out
    assert "sample: the chat template has no system turn; its text goes in front of the first user turn" in said


def test_too_little_text_gives_both_numbers(fresh_folder):
    ran = pipeline("sample", "sample.train_tokens=1000000")
    assert ran.status == 1
    assert "source 'chat' has" in ran.out
    assert "its share is 499,968" in ran.out


def test_missing_columns_and_files(fresh_folder):
    ran = pipeline("sample", "sample.sources.0.rows=text")
    assert ran.status == 1
    assert "'text' needs the column text; the data set has conversation" in ran.out
    ran = pipeline("sample", "sample.sources.0.path=assets/none.jsonl")
    assert ran.status == 1
    assert "sample.sources.0.path: 'assets/none.jsonl'" in ran.out
    Path("assets/broken.jsonl").write_text('{"conversation": [')
    ran = pipeline("sample", "sample.sources.0.path=assets/broken.jsonl")
    assert ran.status == 1
    assert "assets/broken.jsonl" in ran.out
    assert "assets/broken.jsonl, line 1: not valid JSON" in ran.out


def test_what_a_path_may_have_meant(fresh_folder):
    Path("notes.txt").write_text("text")
    ran = pipeline("status", "sample.sources.0.path=notes.txt")
    assert "plain text goes into a .jsonl file" in ran.out
    Path("notes").mkdir()
    ran = pipeline("status", "sample.sources.0.path=notes")
    assert ran.out.endswith("no .jsonl, .json, .parquet or .arrow file there\n")
    ran = pipeline("status", "sample.sources.0.path=assets/tiny-chta.jsonl")
    assert "did you mean 'assets/tiny-chat.jsonl'?" in ran.out
    assert "did you mean 'assets/champ'?" in pipeline("status", "sample.sources.0.path=assets/chmp").out
    assert "`make setup` puts it there" in pipeline("status", "sample.sources.0.path=assets/champ").out


def test_shares_are_met_to_a_context():
    sources = tuple(Source(name=n, path="x", rows="text", share=s) for n, s in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
    config = SampleConfig(
        sources=sources,
        template="chatml",
        context_size=4,
        shard_contexts=7,
        train_tokens=28,
        holdout_tokens=28,
        holdout_fraction=0.1,
    )
    assert contexts_by_source(config, "train") == [4, 2, 1]


@pytest.mark.parametrize("name", ["data[1].jsonl", "folder[1]/data.jsonl", "a*.jsonl", "wh?t.jsonl"])
def test_a_name_with_signs_of_patterns_is_that_file_alone(tmp_path, name):
    for other in ("data1.jsonl", "folder1/data.jsonl", "axe.jsonl", "what.jsonl"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        tiny.write_jsonl(tmp_path / other, [{"text": "another"}])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    tiny.write_jsonl(tmp_path / name, [{"text": "this"}])
    assert taken(open_source(source(tmp_path / name, "text"), None, offline=True)) == [{"text": "this"}]


TEXT = "sample.sources=[{name: t, path: t.jsonl, rows: text, share: 1}]"
NO_SCORE = "evaluate.reason_score=null"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "sample.sources (t).path: 't.jsonl': holds no row"),
        (b'{"text": "good"}\n{"text": "\xff bad"}\n', "t.jsonl, line 2: not UTF-8 text; mend it"),
        (b'{"text": "good"}\n{"text": "\xed\xa0\x80"}\n', "t.jsonl, line 2: not UTF-8 text; mend it"),
        (b'{"text": 3}\n' * 40, "40 of 40 rows hold nothing usable in text: 40 text is a number (as t.jsonl, line"),
    ],
)
def test_text_that_cannot_be_used_is_named(fresh_folder, data, says):
    Path("t.jsonl").write_bytes(data)
    ran = pipeline("sample", TEXT, NO_SCORE)
    assert ran.status == 1
    assert says in ran.out


def test_a_budget_that_does_not_fit_on_the_disk_takes_none_of_it(fresh_folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**15, 0, 10**12))
    ran = pipeline("sample", "sample.train_tokens=1000000000000")
    assert ran.status == 1
    assert "sample.train_tokens, sample.holdout_tokens: 1,000,000,000,512 tokens take 16 TB more" in ran.out
    assert not list(Path("runs").glob("sample/*/scratch/*"))

    def full(descriptor: int, offset: int, size: int) -> None:
        os.truncate(descriptor, size // 2)  # what ext4 leaves of an allocation that failed
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    ran = pipeline("sample")
    assert ran.status == 1
    assert "scratch/0-train-tokens: No space left on device" in ran.out
    assert only(fresh_folder, "runs/sample/*/scratch/0-train-tokens").stat().st_size == 0
    monkeypatch.undo()
    monkeypatch.chdir(fresh_folder)
    assert pipeline("sample").status == 0
