"""Hashes of local files: several at once give what one at a time gives, and nothing is remembered of half a file."""

import hashlib
import json
import threading

import pytest

from harvest.files import UserError
from harvest.store_files import LocalFiles
from pipeline import content
from pipeline.content import ContentHashes


def files_in(folder, count):
    files = [folder / f"{count - number}.bin" for number in range(count)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * (content.BLOCK_BYTES * (number % 3) + number))
    return files


def test_hashes_stand_in_the_order_of_the_files(tmp_path):
    files = files_in(tmp_path, 9)
    pairs = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    expected = "sha256:" + hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    assert ContentHashes(None).files_hash(files) == expected


def test_files_are_read_at_once(tmp_path, monkeypatch):
    barrier = threading.Barrier(LocalFiles.readers, timeout=10)

    def together(_hashes, path):
        barrier.wait()
        return path.name

    monkeypatch.setattr(ContentHashes, "file_hash", together)
    ContentHashes(None).files_hash(files_in(tmp_path, LocalFiles.readers))


def test_what_was_hashed_before_ctrl_c_is_remembered(tmp_path, monkeypatch):
    *files, last = files_in(tmp_path, 6)
    read = ContentHashes._read

    def interrupted(hashes, path):
        if path == last:
            raise KeyboardInterrupt
        return read(hashes, path)

    monkeypatch.setattr(ContentHashes, "_read", interrupted)
    memory = tmp_path / "memory.json"
    with pytest.raises(KeyboardInterrupt):
        ContentHashes(memory).files_hash([*files, last])
    assert ContentHashes(memory).known.keys() == {str(file) for file in files}


def test_half_a_file_is_not_remembered(tmp_path):
    hashes, (file,) = ContentHashes(None), files_in(tmp_path, 1)
    hashes._stop.set()
    with pytest.raises(UserError):
        hashes.file_hash(file)
    assert not hashes.known


def test_an_error_ends_the_others(tmp_path, monkeypatch):
    first, *others = files_in(tmp_path, 1 + LocalFiles.readers)
    seen = []

    def read(hashes, path):
        if path == first:
            raise UserError("wrong")
        seen.append(hashes._stop.wait(10))
        return ""

    monkeypatch.setattr(ContentHashes, "_read", read)
    hashes = ContentHashes(None)
    with pytest.raises(UserError, match="wrong"):
        hashes.files_hash([first, *others])
    assert all(seen)
    monkeypatch.undo()
    assert hashes.files_hash([first, *others]) == ContentHashes(None).files_hash([first, *others])
