"""Files of text that cannot be read are named with what is wrong; the disk's own errors are not put down to them."""

import gzip
import tempfile
from pathlib import Path

import datasets
import pytest
from test_source_files import LINES, LIST, ROWS, texts

from harvest.files import UserError
from harvest.source_files import nearest_hint


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("data", [b"text " * 40, b"PAR1 ARROW1" * 20, b"ARROW1" + bytes(100)])
def test_a_damaged_table_is_named(kind, data):
    Path(f"a.{kind}").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.{kind}: cannot be read as {kind}: \w"):
        texts(f"a.{kind}")


@pytest.mark.parametrize(("end", "says"), [(b"", "the array does not end"), (b', {"te', "Unterminated string")])
def test_an_array_that_was_cut_short_is_named(end, says):
    Path("a.json").write_bytes(LIST.rstrip()[:-1] + end)
    with pytest.raises(UserError, match=rf"a\.json: cannot be read as JSON: {says}.*; it is damaged or half copied"):
        texts("a.json")


def test_a_full_disk_is_no_damage_of_the_file(monkeypatch):
    Path("a.jsonl.gz").write_bytes(gzip.compress(LINES))
    datasets.Dataset.from_list(ROWS).to_parquet("a.parquet")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_where: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    for name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(OSError, match="No space left"):
            texts(name)


def test_a_link_to_nothing_is_named_as_one():
    Path("a.jsonl").symlink_to("gone.jsonl")
    assert nearest_hint("a.jsonl", ["b.jsonl"]) == "; it is a link to a file that is not there"
