"""The files of a store that hold no rows: damage is found and mended, and no shard is judged by a damaged shape."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import contents
from test_activation_store import GEOMETRY, HOOKS, rows

from harvest.activation_store import ActivationStore
from harvest.disk import check_room_for_contexts
from harvest.files import UserError
from harvest.store_files import LocalFiles
from harvest.verify import Bad, verify


@pytest.fixture
def store(tmp_path) -> Path:
    """A store of two hooks, as int8, whose harvest is not finished."""
    store = ActivationStore.create(tmp_path / "store", GEOMETRY._replace(stored="int8"), {"seed": 0})
    for shard in range(2):
        given = rows(shard)
        small = {hook: np.minimum(acts, 0x3F80) for hook, acts in given.acts.items()}  # at most 1, for int8
        store.write_shard("train", shard, given._replace(acts=small))
    return tmp_path / "store"


def again(path: Path) -> None:
    """What the next start of the harvest does first."""
    ActivationStore.create(path, GEOMETRY._replace(stored="int8"), {"seed": 0})


def of_root(**changed: object) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        root = json.loads((store / "zarr.json").read_text())
        (store / "zarr.json").write_text(json.dumps(root | {"attributes": root["attributes"] | changed}))

    return change


def root_without_attributes(store: Path) -> None:
    root = json.loads((store / "zarr.json").read_text())
    (store / "zarr.json").write_text(json.dumps(root | {"attributes": None}))


def of_another_array(store: Path) -> None:
    (store / "train/model.layers.0/norm/zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')


def without(name: str) -> Callable[[Path], None]:
    return lambda store: (store / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        of_root(hooks=[HOOKS[0]]),
        of_root(hooks=[]),
        of_root(d_in=0),
        of_root(d_in=36),
        of_root(context_size=0),
        of_root(train_shards="3"),
        of_root(holdout_shards=-1),
        of_root(chunk_rows=5),
        root_without_attributes,
        of_another_array,
        without("created.json"),
        without("zarr.json"),
        without("train/zarr.json"),
        without("train/model.layers.0/norm/zarr.json"),
    ],
)
def test_no_shard_is_judged_by_damaged_metadata(store, damage):
    before = contents(store)
    damage(store)
    found = verify(LocalFiles(store))
    assert len(found.metadata) >= 1
    assert found.shards == []
    again(store)
    assert contents(store) == before


def test_other_words_for_the_same_are_right(store):
    for path in store.rglob("zarr.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    found = verify(LocalFiles(store))
    assert found.metadata == []
    assert [line.partition(":")[0] for line in found.shards] == ["train shard 2", "holdout shard 0"]  # not made yet


def test_training_does_not_begin_on_damaged_metadata(tmp_path):
    store = ActivationStore.create(tmp_path / "store", GEOMETRY, {"seed": 0})
    for split, count in (("train", 3), ("holdout", 1)):
        for shard in range(count):
            store.write_shard(split, shard, rows(shard))
    store.check_complete()
    of_root(train_shards=2)(tmp_path / "store")
    with pytest.raises(UserError, match=r"train/.*zarr\.json: damaged or missing; `make verify`"):
        ActivationStore.open(tmp_path / "store").check_complete()


def test_a_store_without_created_json_says_what_to_do(store):
    (store / "created.json").unlink()
    with pytest.raises(UserError, match=r"created\.json: missing; `make verify`"):
        ActivationStore.open(store)


@pytest.mark.parametrize("changed", [{"schema": 2}, {"stored": "fp4"}])
def test_a_store_of_other_code_is_no_damage(store, changed):
    of_root(**changed)(store)
    before = contents(store)
    with pytest.raises(UserError, match="this code reads"):
        verify(LocalFiles(store))
    assert contents(store) == before


def test_a_store_that_has_to_be_there(tmp_path):
    files = LocalFiles(tmp_path / "store")
    assert verify(files, complete=True) == Bad([f"{files.path}: no activation store there"], [])
    with pytest.raises(UserError, match="no activation store there"):
        verify(files)


def test_room_for_contexts_counts_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 0, 8_000_000))
    check_room_for_contexts(tmp_path, 500_000, 0)
    with pytest.raises(UserError, match="600,000 tokens take 9"):
        check_room_for_contexts(tmp_path, 600_000, 0)
    for name in ("scratch/0-train-tokens", "contexts/train/tokens/c/0"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(1_000_000))
    check_room_for_contexts(tmp_path, 600_000, 0)
