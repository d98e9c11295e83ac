from itertools import islice

import numpy as np
import pytest
import torch

from harvest.activation_store import ActivationStore, Geometry, ShardRows
from harvest.files import UserError
from train.config import ExcludeConfig
from train.dataloader import ActivationLoader, Batch, Position, heldout_rows
from train.exclusion import input_statistics, kept_rows, mean_row

HOOK = "h"
GEOMETRY = Geometry((HOOK,), d_in=4, context_size=8, shard_contexts=4, chunk_rows=8, train_shards=5, holdout_shards=1)
ROWS = GEOMETRY.train_shards * GEOMETRY.shard_rows
EXCLUDE = ExcludeConfig(token_ids=(3,), positions=(0,), norm_above_median=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """Rows that carry their own number, so that order can be read off."""
    store = ActivationStore.create(tmp_path_factory.mktemp("s") / "store", GEOMETRY, {})
    for split in ("train", "holdout"):
        for shard in range(GEOMETRY.shards(split)):
            number = np.arange(32) + 32 * shard
            acts = np.stack([number, number * 0 + 1, number * 0, number * 0], 1).astype(np.uint16)
            norms = (1 + number % 7).astype(np.float32)
            norms[5] = 1000
            store.write_shard(
                split,
                shard,
                ShardRows(
                    {HOOK: acts},
                    {HOOK: norms},
                    (number % 11).astype(np.uint32),
                    (number // 8).astype(np.uint32),
                    (number % 8).astype(np.uint16),
                ),
            )
    return store


def loader(store, batch_size=24, window_shards=2, pool_rows=40, exclude=EXCLUDE, limit=None, seed=0):
    return ActivationLoader(store, HOOK, exclude, limit, batch_size, window_shards, pool_rows, seed)


def numbers(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([b.rows_BD.view(torch.uint16).numpy()[:, 0] for b in batches])


def kept_numbers() -> list[int]:
    return [n for n in range(ROWS) if n % 11 != 3 and n % 8 != 0]


@pytest.mark.parametrize(("window_shards", "pool_rows", "batch"), [(2, 40, 24), (1, 8, 7), (5, 1000, 64), (99, 64, 33)])
def test_every_kept_row_comes_once_an_epoch(store, window_shards, pool_rows, batch):
    kept = kept_numbers()
    made = list(islice(loader(store, batch, window_shards, pool_rows).batches(Position()), 3 * len(kept) // batch + 1))
    assert {len(b.rows_BD) for b in made} == {batch}
    read = numbers(made)
    epochs = [read[i * len(kept) : (i + 1) * len(kept)].tolist() for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [kept] * 3
    assert epochs[0] != epochs[1]
    assert epochs[0] != kept


def test_rows_of_a_window_come_before_the_next_window(store):
    kept = kept_numbers()
    read = numbers(list(islice(loader(store, 1).batches(Position()), len(kept))))
    assert (np.diff(read // 64) >= 0).all()


def test_the_order_of_a_window_needs_no_later_shard(store):
    shorter = ActivationStore(store.path, GEOMETRY._replace(train_shards=2), {})
    assert np.array_equal(
        numbers(list(islice(loader(store, 10).batches(Position()), 4))),
        numbers(list(islice(loader(shorter, 10).batches(Position()), 4))),
    )


def test_a_resume_at_every_batch_gives_the_rest(store):
    made = list(islice(loader(store).batches(Position()), 14))
    for i, batch in enumerate(made[:-2]):
        again = list(islice(loader(store).batches(batch.next), 2))
        for a, b in zip(again, made[i + 1 :], strict=False):
            assert torch.equal(a.rows_BD, b.rows_BD)
            assert a.next == b.next


def test_the_seed_decides(store):
    a, b, c = (numbers(list(islice(loader(store, seed=s).batches(Position()), 5))) for s in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_statistics_and_the_norm_limit(store):
    exclude = ExcludeConfig(norm_above_median=10)
    statistics = input_statistics(store, HOOK, exclude, window_shards=2)
    norms = np.concatenate([store.read_norms("train", HOOK, s) for s in (0, 1)])
    assert statistics.median_norm == np.median(norms)
    assert statistics.norm_limit == 10 * np.median(norms)
    assert statistics.scale == pytest.approx(2 / norms[norms < 1000].mean())
    kept = kept_rows(store, "train", HOOK, 0, exclude, statistics.norm_limit)
    assert np.flatnonzero(~kept).tolist() == [5]


def test_the_mean_row_is_that_of_the_kept_rows_of_the_first_window(store):
    bits = np.array([n for n in kept_numbers() if n < 64 and n % 32 != 5], np.uint32) << 16
    exclude = EXCLUDE.model_copy(update={"norm_above_median": 10})
    mean_D = mean_row(store, HOOK, exclude, 40.0, window_shards=2)
    assert mean_D[0] == pytest.approx(bits.view(np.float32).mean(dtype=np.float64), rel=1e-6, abs=0)
    assert mean_D[2] == 0


def test_heldout_rows_are_the_first_kept_ones(store):
    rows = heldout_rows(store, HOOK, EXCLUDE, None, 10).view(torch.uint16).numpy()[:, 0]
    assert rows.tolist() == kept_numbers()[:10]
    assert len(heldout_rows(store, HOOK, EXCLUDE, None, 10**6)) == len([n for n in kept_numbers() if n < 32])


def test_rows_that_leave_nothing_to_learn_are_refused(store, tmp_path):
    nothing = ExcludeConfig(positions=tuple(range(8)))
    with pytest.raises(UserError, match=r"train.exclude: .*leaves no held-out row of h; exclude less"):
        heldout_rows(store, HOOK, nothing, None, 10)
    with pytest.raises(UserError, match=r"train.exclude: .*leaves no row of the first window; exclude less"):
        input_statistics(store, HOOK, nothing, window_shards=2)
    zeros = ActivationStore.create(tmp_path / "store", GEOMETRY._replace(train_shards=1, holdout_shards=0), {})
    number, norms = np.arange(32), {HOOK: np.zeros(32, np.float32)}
    places = number.astype(np.uint32), (number // 8).astype(np.uint32), (number % 8).astype(np.uint16)
    zeros.write_shard("train", 0, ShardRows({HOOK: np.zeros((32, 4), np.uint16)}, norms, *places))
    with pytest.raises(UserError, match=r"/store: all rows of h in the first window are zero"):
        input_statistics(zeros, HOOK, ExcludeConfig(), window_shards=2)


@pytest.mark.parametrize(("window_shards", "pool_rows", "batch"), [(2, 40, 24), (1, 8, 7), (99, 64, 33)])
def test_the_rows_of_a_batch_are_known_from_its_position(store, window_shards, pool_rows, batch):
    made = loader(store, batch, window_shards, pool_rows)
    start = Position()
    for each in islice(made.batches(start), 20):
        assert made.rows_between(start, each.next).tolist() == numbers([each]).tolist()
        start = each.next


def test_a_batch_is_described_by_its_largest_rows(store):
    made = loader(store)
    first = next(made.batches(Position()))
    row = max(numbers([first]).tolist(), key=lambda n: 1000 if n % 32 == 5 else 1 + n % 7)
    norm = 1000 if row % 32 == 5 else 1 + row % 7
    described = made.describe(Position(), first.next, count=1)
    assert f"(token {row % 11}, norm {norm})" in described or norm < 1000
    assert f"norm {norm})" in described
