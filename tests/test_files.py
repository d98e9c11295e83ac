"""Files of our own, read back: what is no such file is named."""

import os
from pathlib import Path

import pytest

from harvest import files
from harvest.files import UserError, is_abandoned, is_locked, locked, parse_json, partial_name, read_json


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b" " * 101, "larger than 100 bytes; this is not a file of ours"),
        (b"[1, 2]", "not a JSON object; it was damaged or half copied"),
        (b"null", "not a JSON object; it was damaged or half copied"),
        (b'{"a": 1', "not valid JSON; it was damaged or half copied"),
        (b"[" * 90, "not valid JSON; it was damaged or half copied"),
    ],
)
def test_what_is_no_json_object_of_ours_is_named(tmp_path, monkeypatch, data, says):
    """Of a file and of what a bucket holds alike."""
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    path = tmp_path / "begun.json"
    path.write_bytes(data)
    for place, read in ((path, lambda: read_json(path)), ("s3://b/x.json", lambda: parse_json(data, "s3://b/x.json"))):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == f"{place}: {says}"


def test_a_large_file_is_not_read_to_be_refused(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _self: pytest.fail("was read"))
    with pytest.raises(UserError, match="larger than"):
        read_json(path)


def test_another_users_writer_is_alive(tmp_path, monkeypatch):
    """The system then says that it may not be sent a signal, and what it writes stays."""

    def kill(_process: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not is_abandoned(partial_name(tmp_path / "0"), alone=True)


def test_a_lock_in_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    opened = Path.open

    def refusing(self, mode="r", *arguments):
        if "+" in mode and self.name == ".lock-train":
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *arguments)

    assert not is_locked(tmp_path, "train")
    with locked(tmp_path, "train"):
        monkeypatch.setattr(Path, "open", refusing)
        assert is_locked(tmp_path, "train")
    assert not is_locked(tmp_path, "train")
