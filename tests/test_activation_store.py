import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from harvest import verify
from harvest.activation_store import FILL, PROVENANCE, ActivationStore, Geometry, ShardRows, slug
from harvest.files import UserError

HOOKS = ("model.layers.0", "model.layers.1")
GEOMETRY = Geometry(HOOKS, d_in=24, context_size=8, shard_contexts=4, chunk_rows=8, train_shards=3, holdout_shards=1)


def rows(shard: int) -> ShardRows:
    rng = np.random.default_rng(shard)
    n = GEOMETRY.shard_rows
    return ShardRows(
        acts={hook: rng.integers(0, 0x7F00, (n, 24), np.uint16) for hook in HOOKS},
        norms={hook: rng.random(n, np.float32) for hook in HOOKS},
        token_id=rng.integers(0, 100, n).astype(np.uint32),
        context=np.arange(n, dtype=np.uint32) // 8,
        position=np.arange(n, dtype=np.uint16) % 8,
    )


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    store = ActivationStore.create(tmp_path / "store", GEOMETRY, {"seed": 0})
    for split in ("holdout", "train"):
        for shard in range(GEOMETRY.shards(split)):
            store.write_shard(split, shard, rows(shard))
    return store


def test_rows_come_back(store):
    again = ActivationStore.open(store.path)
    again.check_complete()
    for shard in range(3):
        for hook in HOOKS:
            chunks = [again.read_chunk("train", hook, shard * 4 + i) for i in range(4)]
            assert np.array_equal(np.concatenate(chunks), rows(shard).acts[hook])
            assert np.array_equal(again.read_norms("train", hook, shard), rows(shard).norms[hook])
        for name in ("token_id", "context", "position"):
            assert np.array_equal(again.read_provenance("train", name, shard), getattr(rows(shard), name))
        again.verify_shard("train", shard)


def test_a_folder_may_be_a_link_to_another_disk(store, tmp_path):
    digest = verify.digest(store.files)
    shutil.move(store.files.place("train"), tmp_path / "elsewhere")
    store.files.place("train").symlink_to(tmp_path / "elsewhere")
    again = ActivationStore.open(store.path)
    again.check_complete()
    assert again.complete_shards("train") == {0, 1, 2}
    assert verify.digest(again.files) == digest
    partial = tmp_path / "elsewhere" / HOOKS[0] / "acts/c/1/.0.another-host.1.partial"
    partial.touch()
    again.files.sweep(alone=True)
    assert not partial.exists()
    (tmp_path / "elsewhere" / HOOKS[0] / "acts/c/1/0").unlink()
    with pytest.raises(UserError, match=r"acts/c/1/0: missing"):
        again.check_complete()


def test_rows_that_look_like_fill_values_are_written(tmp_path):
    """Of the first shard of one context, every context number is 0."""
    geometry = GEOMETRY._replace(train_shards=1, holdout_shards=0)
    store = ActivationStore.create(tmp_path / "store", geometry, {})
    zeros = {name: np.zeros(geometry.shard_rows, dtype) for name, dtype in PROVENANCE.items()}
    store.write_shard("train", 0, rows(0)._replace(**zeros))
    store.check_complete(("train",))
    store.verify_shard("train", 0)
    assert (store.read_provenance("train", "context", 0) == 0).all()


def test_plain_zarr_opens_it(store):
    group = zarr.open_group(str(store.path), mode="r")
    acts = group["train/model.layers.1/acts"]
    assert acts.shape == (96, 24)
    assert acts.dtype == np.uint16
    assert acts.fill_value == FILL
    assert (acts.chunks, acts.shards) == ((8, 24), (32, 24))
    assert np.array_equal(acts[32:64], rows(1).acts[HOOKS[1]])
    assert group.attrs["logical_dtype"] == "bfloat16"


def test_shard_layout_is_what_the_docs_say(store):
    """Chunks in order, each followed by its crc32c; then the index (offset, bytes) and the index's crc32c."""
    data = (store.path / "train/model.layers.0/acts/c/1/0").read_bytes()
    size = 8 * 24 * 2 + 4
    index = np.frombuffer(data[-(4 * 16 + 4) : -4], "<u8").reshape(4, 2)
    assert index.tolist() == [[i * size, size] for i in range(4)]
    assert len(data) == 4 * size + 4 * 16 + 4
    assert data[: size - 4] == rows(1).acts[HOOKS[0]][:8].tobytes()


def test_equal_rows_make_equal_bytes(store, tmp_path):
    other = ActivationStore.create(tmp_path / "other", GEOMETRY, {"seed": 0})
    for shard in (2, 0, 1):
        other.write_shard("train", shard, rows(shard))
    other.write_shard("holdout", 0, rows(0))
    files = sorted(p.relative_to(store.path) for p in store.path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(other.path) for p in other.path.rglob("*") if p.is_file())
    assert all((store.path / f).read_bytes() == (other.path / f).read_bytes() for f in files)


def test_a_shard_counts_only_with_its_record(store):
    store.record_path("train", 1).unlink()
    again = ActivationStore.open(store.path)
    assert again.complete_shards("train") == {0, 2}
    with pytest.raises(UserError, match="1 of 3 train shards are missing, first 1"):
        again.check_complete()


ACTS = "train/model.layers.0/acts/c/1/0"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", [ACTS, "train/model.layers.1/norm/c/1", "train/row/token_id/c/1"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_files_of_the_wrong_size_are_found_at_opening(store, name, damage):
    path = store.path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"{name}: .*bytes expected; `make verify`"):
        ActivationStore.open(store.path).check_complete()


def read_shard_1(store: ActivationStore, name: str) -> None:
    if "acts" in name:
        for chunk in range(4, 8):
            store.read_chunk("train", HOOKS[0], chunk)
    elif "norm" in name:
        store.read_norms("train", HOOKS[1], 1)
    else:
        store.read_provenance("train", "token_id", 1)


@pytest.mark.parametrize("name", [ACTS, "train/model.layers.1/norm/c/1", "train/row/token_id/c/1"])
@pytest.mark.parametrize("at", [0, 33, 127])
def test_a_flipped_bit_is_found(store, name, at):
    flip(store.path / name, at)
    again = ActivationStore.open(store.path)
    again.check_complete()
    with pytest.raises(UserError, match=name):
        again.verify_shard("train", 1)
    with pytest.raises(UserError, match=name):
        read_shard_1(again, name)


@pytest.mark.parametrize("at", [-2, -20])
def test_a_flipped_bit_of_an_index_is_found_by_who_reads_every_byte(store, at):
    flip(store.path / ACTS, at)
    read_shard_1(ActivationStore.open(store.path), ACTS)  # the rows are those of the record
    with pytest.raises(UserError, match="its index is damaged"):
        store.verify_shard("train", 1)


def test_a_shard_in_the_place_of_another_is_found(store):
    """Whole-file crc32c's would be equal: data and its crc32c together have the same one, whatever the data."""
    a, b = (store.path / f"train/model.layers.0/acts/c/{i}/0" for i in (0, 1))
    a.write_bytes(b.read_bytes())
    with pytest.raises(UserError, match="acts/c/0/0: its bytes have changed"):
        ActivationStore.open(store.path).verify_shard("train", 0)


def test_a_chunk_that_vanishes_after_opening_is_no_fill_value(store):
    again = ActivationStore.open(store.path)
    (store.path / ACTS).unlink()
    with pytest.raises(UserError, match="acts/c/1/0: missing"):
        again.read_chunk("train", HOOKS[0], 5)
    (store.path / "train/row/position/c/1").unlink()
    with pytest.raises(UserError, match="row/position/c/1: missing"):
        again.read_provenance("train", "position", 1)


def test_a_torn_store_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="no activation store there"):
        ActivationStore.open(tmp_path)
    meta = json.loads((store.path / "zarr.json").read_text())
    del meta["attributes"]["d_in"]
    (store.path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="do not describe a store"):
        ActivationStore.open(store.path)


@pytest.mark.parametrize("hook", ["", "..", "row", "shards", "__init__", "/"])
def test_a_hook_never_leaves_its_folder(hook):
    try:
        name = slug(hook)
    except UserError:
        return
    assert "/" not in name
    assert name not in ("", ".", "..", "row", "shards")


@pytest.mark.parametrize(
    "changed",
    [{"rows": 31}, {"rows": None}, {"files": {}}, {"files": 7}, {"norms": {}}, {"norms": {HOOKS[0]: {}}}],
)
def test_a_record_that_does_not_describe_its_shard_is_named(store, changed):
    path = store.record_path("train", 1)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changed))
    with pytest.raises(UserError, match=r"shards/00001\.json: damaged: it does not describe a shard; `make verify`"):
        store.records("train")
    assert store.complete_shards("train") == {0, 2}
    del record["norms"][HOOKS[0]]["sum"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not describe a shard"):
        store.record("train", 1)


def test_sums_of_norms_that_are_not_those_of_the_rows_are_found(store):
    """They decide which rows training leaves out, and how it scales the others."""
    path = store.record_path("train", 1)
    record = json.loads(path.read_text())
    record["norms"][HOOKS[1]]["sum"] += 1
    path.write_text(json.dumps(record))
    store.verify_shard("train", 0)
    with pytest.raises(UserError, match=r"shards/00001\.json: its sums of norms are not those of the shard"):
        store.verify_shard("train", 1)


def test_a_row_of_fill_values_is_never_handed_out(tmp_path):
    """Whoever wrote it: it stands for rows that are not there."""
    store = ActivationStore.create(tmp_path / "store", GEOMETRY, {})
    given = rows(0)
    given.acts[HOOKS[0]][13] = FILL
    store.write_shard("train", 0, given)
    store.read_chunk("train", HOOKS[0], 0)
    with pytest.raises(UserError, match=r"train/model\.layers\.0/acts/c/0/0: rows are missing from it"):
        store.read_chunk("train", HOOKS[0], 1)


def test_hooks_of_one_folder_are_refused(tmp_path):
    geometry = GEOMETRY._replace(hooks=("layers/0", "layers-0"))
    with pytest.raises(UserError, match=r"harvest\.hooks: 'layers-0': another hook has the same folder, layers-0"):
        ActivationStore.create(tmp_path / "store", geometry, {})
