"""Stores and the zarr API (tests/zarr_twin.py) write the same bytes and read them alike, in every stored form."""

import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from conftest import contents
from zarr_twin import through_zarr

from harvest.activation_store import ActivationStore, Geometry, ShardRows
from harvest.files import UserError

SHAPES = {
    "usual": Geometry(("h", "model.layers.1"), 24, 8, 4, 8, train_shards=2, holdout_shards=1),
    "one value a row, one row a chunk": Geometry(("h",), 1, 3, 1, 1, train_shards=2, holdout_shards=1),
    "odd width, one chunk a shard": Geometry(("h",), 65, 5, 3, 15, train_shards=1, holdout_shards=1),
    "chunks across contexts": Geometry(("h",), 63, 6, 2, 4, train_shards=1, holdout_shards=1),
}
FORMS = ("bf16", "bf16-zstd", "int8")


def shard_rows(g: Geometry, shard: int) -> ShardRows:
    generator = torch.Generator().manual_seed(shard)
    acts = {hook: torch.randn(g.shard_rows, g.d_in, generator=generator).bfloat16() for hook in g.hooks}
    number = np.arange(g.shard_rows)
    return ShardRows(
        {hook: rows.view(torch.uint16).numpy() for hook, rows in acts.items()},
        {hook: rows.float().norm(dim=1).numpy() for hook, rows in acts.items()},
        ((number + shard) % 11).astype(np.uint32),
        (number // g.context_size).astype(np.uint32),
        (number % g.context_size).astype(np.uint16),
    )


def write(path, geometry: Geometry) -> ActivationStore:
    store = ActivationStore.create(path, geometry, {"seed": 0})
    for split in ("holdout", "train"):
        for shard in range(geometry.shards(split)):
            store.write_shard(split, shard, shard_rows(geometry, shard))
    return store


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_write_the_same_bytes(tmp_path, shape, form):
    geometry = SHAPES[shape]._replace(stored=form)
    write(tmp_path / "ours", geometry)
    with through_zarr():
        write(tmp_path / "zarr", geometry)
    assert contents(tmp_path / "ours") == contents(tmp_path / "zarr")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_read_the_same_rows(tmp_path, shape, form):
    g = SHAPES[shape]._replace(stored=form)
    write(tmp_path, g)
    store = ActivationStore.open(tmp_path)
    store.check_complete()
    store.verify_shard("train", 0)
    for hook in g.hooks:
        chunks = list(range(g.train_shards * g.chunks_per_shard))[::-1]
        pool = np.empty((len(chunks) * g.chunk_rows, g.d_in), np.uint16)
        store.read_chunks("train", hook, chunks, pool)
        norms = store.read_norms("train", hook, 0)
        with through_zarr():
            assert np.array_equal(pool, np.concatenate([store.read_chunk("train", hook, c) for c in chunks]))
            assert np.array_equal(norms, store.read_norms("train", hook, 0))
        rows = shard_rows(g, 0).acts[hook][: g.chunk_rows]
        if form != "int8":
            assert np.array_equal(pool[-g.chunk_rows :], rows)


def test_rows_of_another_shape_or_type_are_refused(tmp_path):
    g = SHAPES["usual"]
    store = ActivationStore.create(tmp_path, g, {})
    rows = shard_rows(g, 0)
    with pytest.raises(ValueError, match=r"rows of shape \(31, 24\) for a shard of 32"):
        store.write_shard("train", 0, rows._replace(acts={hook: acts[1:] for hook, acts in rows.acts.items()}))
    with pytest.raises(TypeError):
        store.write_shard("train", 0, rows._replace(norms={hook: n.astype("f8") for hook, n in rows.norms.items()}))
    assert store.complete_shards("train") == set()


def test_visits_are_of_every_chunk_in_memory_that_is_used_again(tmp_path):
    g = SHAPES["usual"]
    write(tmp_path, g)
    store, hook = ActivationStore.open(tmp_path), g.hooks[0]
    chunks = [*range(g.train_shards * g.chunks_per_shard)][::-1] * 3
    seen: dict[int, np.ndarray] = {}
    addresses = set()

    def visit(place: int, rows: np.ndarray) -> None:
        seen[place] = rows.copy()
        addresses.add(rows.ctypes.data)

    store.visit_chunks("train", hook, chunks, visit)
    assert len(addresses) <= store.files.readers < len(chunks)
    for place, chunk in enumerate(chunks):
        assert np.array_equal(seen[place], store.read_chunk("train", hook, chunk))

    def fail(place: int, _rows: np.ndarray) -> None:
        raise KeyError(place)

    with pytest.raises(KeyError):
        store.visit_chunks("train", hook, chunks, fail)


def test_chunks_in_another_order_are_found(tmp_path):
    """Each is whole, and so is the index that leads to them, which readers of ours do not look at."""
    g = SHAPES["usual"]
    store = write(tmp_path, g)
    file = tmp_path / "train/h/acts/c/1/0"
    data, size = file.read_bytes(), 8 * 24 * 2 + 4
    index = np.frombuffer(data[4 * size : -4], "<u8").reshape(4, 2)[[1, 0, 2, 3]].tobytes()
    swapped = data[size : 2 * size] + data[:size] + data[2 * size : 4 * size]
    file.write_bytes(swapped + index + google_crc32c.value(index).to_bytes(4, "little"))
    with pytest.raises(UserError, match="h/acts/c/1/0: its index is not that of chunks in order"):
        store.verify_shard("train", 1)
    assert store.read_chunk("train", "h", 3).shape == (8, 24)
    with pytest.raises(UserError, match="its bytes have changed"):
        store.read_chunk("train", "h", 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("damage", "says"), [(Path.unlink, "missing"), (lambda path: os.truncate(path, 10), "truncated")]
)
def test_a_file_that_is_gone_or_cut_short_since_the_store_was_opened(tmp_path, form, damage, says):
    write(tmp_path, SHAPES["usual"]._replace(stored=form))
    store = ActivationStore.open(tmp_path)
    store.check_complete()
    name = "acts_q" if form == "int8" else "acts"
    damage(tmp_path / f"train/h/{name}/c/1/0")
    with pytest.raises(UserError, match=f"train/h/{name}/c/1/0: {says}; `make verify`"):
        store.read_chunk("train", "h", 4)


def test_a_file_that_the_system_cannot_read(tmp_path):
    store = write(tmp_path, SHAPES["usual"])
    file = tmp_path / "train/h/acts/c/1/0"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="train/h/acts/c/1/0: cannot be read: Is a directory; `make verify`"):
        store.read_chunk("train", "h", 4)
