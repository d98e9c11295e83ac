"""What a look at the files of a stage's directory finds, whatever state they are in."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import only

from harvest import stage_directory
from harvest.contexts import Contexts
from harvest.files import UserError, write_sealed
from harvest.row_files import missing_rows
from harvest.stage_directory import Run, _commit


def test_a_damaged_record_hides_nothing_of_other_shards(run_folder):
    harvest = only(run_folder, "runs/harvest/*")
    assert missing_rows(harvest) == []
    (harvest / "store/train/shards/00000.json").write_text("{")
    (harvest / "store/train/row/position/c/0").unlink()
    (harvest / "store/train/row/position/c/1").unlink()
    assert missing_rows(harvest) == ["store/train/row/position/c/1"]


def test_where_a_store_lies(tmp_path):
    run = Run(tmp_path / "harvest" / "0123456789ab")
    assert run.store_url is None
    run.path.mkdir(parents=True)
    write_sealed(run.path / "begun.json", {"store": {"url": "s3://bucket/a", "allow_http": False}})
    assert run.store_url == "s3://bucket/a"
    (run.path / "begun.json").write_text('{"store": {')
    assert run.store_url is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("zarr.json", None, r"contexts: no contexts there, or damaged ones \(.*No such file"),
        ("zarr.json", "{}", r"contexts: no contexts there, or damaged ones \('attributes'\)"),
        ("zarr.json", "[", r"contexts: no contexts there, or damaged ones \("),
        ("train/tokens/zarr.json", None, r"contexts/train/tokens: missing or damaged \(.*No such file"),
        ("train/tokens/zarr.json", "{}", r"contexts/train/tokens: missing or damaged \('chunk_grid'\)"),
    ],
)
def test_contexts_that_are_gone_or_damaged_are_named(finished, tmp_path, name, content, says):
    folder = tmp_path / "sample"
    shutil.copytree(only(finished, "runs/sample/*"), folder)
    file = folder / "contexts" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=says + ".*; `python -m pipeline sample --force` makes them anew"):
        Contexts(folder / "contexts").read("train", "tokens", 0, 4)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_the_code(tmp_path, monkeypatch):
    """With a mark where files differ from it; it tells a reader of a manifest what made the result."""

    def git(*arguments: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", tmp_path, *named, *arguments], check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(stage_directory, "__file__", str(tmp_path / "harvest" / "stage_directory.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert _commit() == "unknown"
    git("init", "-q")
    Path(tmp_path, "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "Begin")
    assert _commit() == git("rev-parse", "HEAD").strip()
    Path(tmp_path, "a.py").write_text("a = 2\n")
    assert _commit() == git("rev-parse", "HEAD").strip() + "-dirty"
