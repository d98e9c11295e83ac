"""A file that changes while it is read is never taken for the one that was hashed."""

import hashlib
import os
from pathlib import Path

import pytest

from harvest.opened_file import ChangedError, OpenedFile

DATA = bytes(range(256)) * 3


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "rows"
    path.write_bytes(DATA)
    return path


def test_a_change_that_the_clock_does_not_show_is_found_by_the_hash(path, monkeypatch):
    """Clocks of file systems are coarse: what is written at about the time of the hash leaves no mark."""
    file = OpenedFile(path)
    file.hash()
    assert file.sha256 == hashlib.sha256(DATA).hexdigest()
    stamp = file._look()
    monkeypatch.setattr(OpenedFile, "_look", lambda _self: stamp)
    file.check()
    path.write_bytes(b"x" + DATA[1:])
    with pytest.raises(ChangedError, match=f"{path}: changed while it was read; the same command again takes what"):
        file.check()
    assert file.sha256 == hashlib.sha256(DATA).hexdigest()


def test_a_file_that_has_become_shorter(path):
    file = OpenedFile(path)
    assert file.read(3, 700) == DATA[3:703]
    os.truncate(path, 500)
    with pytest.raises(ChangedError, match=f"{path}: changed while it was read"):
        file.read(3, 700)


def test_what_the_kernel_gives_in_parts_is_whole(path, monkeypatch):
    """It gives no more than 2 GB at once."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, min(size, 100), start))
    assert OpenedFile(path).read(3, 700) == DATA[3:703]
