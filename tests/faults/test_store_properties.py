"""Store and loader for arbitrary shapes: what is read is what was written, in an order that loses nothing."""

import os
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from conftest import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr_twin import through_zarr

from harvest.activation_store import ActivationStore, Geometry, ShardRows
from harvest.workers import Shard, Workers
from train.config import ExcludeConfig
from train.dataloader import ActivationLoader, Position
from train.exclusion import kept_rows

HOOKS = ("a", "b")
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "10"))
quick = settings(
    max_examples=EXAMPLES, derandomize=EXAMPLES == 10, deadline=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def geometries(draw) -> Geometry:
    """Any shapes that fit each other; widths that are no power of two, chunks of one row, one shard or several."""
    context_size, shard_contexts = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    rows = context_size * shard_contexts
    return Geometry(
        hooks=HOOKS[: draw(st.integers(1, 2))],
        d_in=draw(st.integers(1, 70)),
        context_size=context_size,
        shard_contexts=shard_contexts,
        chunk_rows=draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0])),
        train_shards=draw(st.integers(1, 4)),
        holdout_shards=draw(st.integers(1, 2)),
    )


def written(path: Path, g: Geometry, seed: int) -> tuple[ActivationStore, dict[tuple[str, int], ShardRows]]:
    """A store of random bits that are numbers, and what was written into it. The rows of a split are numbered."""
    rng = np.random.default_rng(seed)
    store = ActivationStore.create(path, g, {"seed": seed})
    rows = {}
    for split in ("holdout", "train"):
        for shard in range(g.shards(split)):
            n = g.shard_rows
            acts = {hook: rng.integers(0, 0x7F80, (n, g.d_in), np.uint16) for hook in g.hooks}
            for hook_rows in acts.values():
                hook_rows[:, 0] = shard * n + np.arange(n)
            rows[split, shard] = ShardRows(
                acts,
                {hook: rng.random(n, np.float32) for hook in g.hooks},
                rng.integers(0, 4, n).astype(np.uint32),
                np.full(n, rng.integers(2), np.uint32),
                rng.integers(0, 3, n).astype(np.uint16),
            )
            store.write_shard(split, shard, rows[split, shard])
    return store, rows


@quick
@given(geometries(), st.integers(0, 99), st.booleans())
def test_rows_read_are_rows_written(g, seed, by_zarr):
    with tempfile.TemporaryDirectory() as folder:
        with through_zarr(by_zarr):
            _, rows = written(Path(folder) / "store", g, seed)
        store = ActivationStore.open(Path(folder) / "store")
        assert store.geometry == g
        store.check_complete()
        for (split, shard), expected in rows.items():
            store.verify_shard(split, shard)
            for hook in g.hooks:
                chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
                read = np.concatenate([store.read_chunk(split, hook, chunk) for chunk in chunks])
                assert np.array_equal(read, expected.acts[hook])
                assert np.array_equal(store.read_norms(split, hook, shard), expected.norms[hook])
            for name in ("token_id", "context", "position"):
                assert np.array_equal(store.read_provenance(split, name, shard), getattr(expected, name))


@quick
@given(geometries(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_workers_of_any_number_in_any_order_write_the_same_store(g, world, random):
    with tempfile.TemporaryDirectory() as folder:
        alone, rows = written(Path(folder) / "alone", g, 0)
        every = [Shard(split, number) for split in ("holdout", "train") for number in range(g.shards(split))]
        shares = [list(Workers(rank, world).share(every)) for rank in range(world)]
        made = [shard for share in shares for shard in share]
        assert sorted(made) == sorted(every)
        random.shuffle(made)
        shared = ActivationStore.create(Path(folder) / "shared", g, {"seed": 0})
        for shard in made:
            shared.write_shard(*shard, rows[shard])
        assert contents(Path(alone.path)) == contents(Path(shared.path))


@st.composite
def readings(draw) -> dict:
    """Settings of a loader."""
    ids = st.lists(st.integers(0, 3), max_size=2, unique=True).map(tuple)
    return {
        "exclude": ExcludeConfig(
            token_ids=draw(ids), positions=draw(st.sampled_from([(), (0,)])), norm_above_median=None
        ),
        "norm_limit": draw(st.sampled_from([None, 0.5])),
        "batch_size": draw(st.integers(1, 60)),
        "window_shards": draw(st.integers(1, 6)),
        "pool_rows": draw(st.integers(1, 120)),
        "seed": draw(st.integers(0, 9)),
    }


@quick
@given(geometries(), readings())
def test_every_kept_row_comes_once_an_epoch_and_a_resume_at_any_batch_goes_on(g, reading):
    with tempfile.TemporaryDirectory() as folder:
        store, rows = written(Path(folder) / "store", g, 0)
        hook, batch = g.hooks[-1], reading["batch_size"]
        keep = [
            kept_rows(store, "train", hook, shard, reading["exclude"], reading["norm_limit"])
            for shard in range(g.train_shards)
        ]
        kept = np.concatenate([rows["train", s].acts[hook][k] for s, k in enumerate(keep)])
        if not len(kept):
            return  # training refuses such a store before it reads
        loader = ActivationLoader(store, hook, **reading)
        made = list(islice(loader.batches(Position()), -(-2 * len(kept) // batch) + 1))
        read = np.concatenate([b.rows_BD.view(torch.uint16).numpy() for b in made])
        assert {len(b.rows_BD) for b in made} == {batch}
        for epoch in range(2):
            of_epoch = read[epoch * len(kept) : (epoch + 1) * len(kept)]
            assert np.array_equal(of_epoch[np.argsort(of_epoch[:, 0])], kept)
        for i, done in enumerate(made[:-1]):
            again = next(ActivationLoader(store, hook, **reading).batches(done.next))
            assert again.rows_BD.equal(made[i + 1].rows_BD)
            assert again.next == made[i + 1].next
