"""What can happen to a store: each fault is found, its file is named, and no wrong row reaches training."""

import os
import resource
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from test_array_files import SHAPES, shard_rows, write

from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.config import ExcludeConfig
from train.dataloader import ActivationLoader, Position

HOOK = "h"
G = SHAPES["usual"]._replace(train_shards=3)
ACTS, NORM, TOKENS = f"train/{HOOK}/acts/c/1/0", f"train/{HOOK}/norm/c/1", "train/row/token_id/c/1"
RECORD = "train/shards/00001.json"


@pytest.fixture
def store(tmp_path) -> Path:
    return write(tmp_path / "store", G).path


def train(path: Path) -> None:
    """Open a store as training does, and read two epochs of it."""
    store = ActivationStore.open(path)
    store.check_complete()
    loader = ActivationLoader(store, HOOK, ExcludeConfig(token_ids=(3,), norm_above_median=10), 9.0, 16, 2, 32, 0)
    for _ in islice(loader.batches(Position()), 12):
        pass


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Trade places with the same file of the next shard."""
    other = Path(str(path).replace("/c/1", "/c/2"))
    path.rename(path.with_name("aside"))
    other.rename(path)
    path.with_name("aside").rename(other)


FAULTS = {
    "a flipped bit": (flip, ACTS),
    "a flipped bit of a norm": (flip, NORM),
    "a truncated file": (lambda path: os.truncate(path, 100), ACTS),
    "a deleted shard": (Path.unlink, ACTS),
    "a deleted chunk of provenance": (Path.unlink, TOKENS),
    "a deleted record": (Path.unlink, RECORD),
    "files swapped between shards": (swap, ACTS),
    "provenance swapped between shards": (swap, TOKENS),
    "norms swapped between shards": (swap, NORM),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_stops_and_names_the_file(store, fault):
    train(store)
    change, name = FAULTS[fault]
    change(store / name)
    named = r"1 of 3 train shards are missing, first 1" if name == RECORD else name.replace("/1", "/[12]")
    with pytest.raises(UserError, match=named):
        train(store)


def read_shard(store: ActivationStore, shard: int, name: str) -> None:
    if name == ACTS:
        pool = np.empty((G.shard_rows, G.d_in), np.uint16)
        store.read_chunks("train", HOOK, range(shard * 4, shard * 4 + 4), pool)
    elif name == NORM:
        store.read_norms("train", HOOK, shard)
    else:
        store.read_provenance("train", "token_id", shard)


@pytest.mark.parametrize("name", [ACTS, NORM, TOKENS])
def test_a_file_that_vanishes_or_changes_after_opening(store, name):
    again = ActivationStore.open(store)
    again.check_complete()
    again.read_chunk("train", HOOK, 5)
    flip(store / name)
    (store / name.replace("/1", "/2")).unlink()
    for shard in (1, 2):
        with pytest.raises(UserError, match=name.replace("/1", f"/{shard}")):
            read_shard(again, shard, name)


@pytest.mark.parametrize("form", ["bf16", "bf16-zstd", "int8"])
def test_a_full_disk_leaves_what_was_there(tmp_path, form):
    path = write(tmp_path / "store", G._replace(stored=form)).path
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            ActivationStore.open(path).write_shard("train", 1, shard_rows(G, 7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "/train/h/acts" in str(caught.value.filename)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_read_only_folder_is_read_and_not_written(store):
    folders = [store, *(p for p in store.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    user = os.geteuid()
    above = [p for p in store.parents if p.stat().st_uid == user and p.stat().st_mode & 0o077 == 0] if not user else []
    for folder in above:
        folder.chmod(0o711)
    if not user:
        os.seteuid(65534)  # the root user writes everywhere
    try:
        train(store)
        with pytest.raises(PermissionError) as caught:
            ActivationStore.open(store).write_shard("train", 1, shard_rows(G, 1))
        assert "/train/h/acts/c/1" in str(caught.value.filename)
    finally:
        os.seteuid(user)
        for folder in above:
            folder.chmod(0o700)
        for folder in folders:
            folder.chmod(0o755)


def test_other_forms_find_a_file_of_another_shard(tmp_path):
    for form, name in (("bf16-zstd", "acts"), ("int8", "acts_q"), ("int8", "acts_scale")):
        path = write(tmp_path / f"{form} {name}", G._replace(stored=form)).path
        file = path / f"train/{HOOK}/{name}/c/1/0"
        other = ActivationStore.create(tmp_path / f"other {form} {name}", G._replace(stored=form), {})
        other.write_shard("train", 1, shard_rows(G, 9))
        file.write_bytes((other.path / f"train/{HOOK}/{name}/c/1/0").read_bytes())
        with pytest.raises(UserError, match=f"{name}/c/1/0: its bytes have changed"):
            ActivationStore.open(path).read_chunk("train", HOOK, 4)
