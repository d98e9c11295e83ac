"""Shuffled batches of activations from a store, in an order that a resume can repeat.

Rows are permuted within a shard when they are written. Reading takes windows of consecutive shards;
within a window chunks come in random order, up to `pool_rows` rows of them at a time into a pool, and
the kept rows of a pool in random order. Batches are cut from the endless stream of pools: one may
straddle two pools, windows or epochs, none is short, no kept row is lost.
The position yielded with a batch is all that a resume needs; the seed does the rest. The order of a
window depends on no later shard. Costs two pools of memory: one is filled while the other is used.

The threads that read put each row at its place of the permuted pool while its chunk is in the cache, so a batch
is a part of the pool and costs nothing where it is asked for.

Shape suffixes: B rows of a batch, D d_in, N rows.
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.activation_store import PROVENANCE, ActivationStore
from harvest.files import UserError
from train.config import ExcludeConfig
from train.exclusion import kept_rows


class Position(NamedTuple):
    """Where the next batch starts: `row` counts the kept rows of a pool."""

    epoch: int = 0
    window: int = 0
    pool: int = 0
    row: int = 0


class Batch(NamedTuple):
    """Rows of a step, and where the next batch starts."""

    rows_BD: Tensor  # bfloat16, as stored, on the host; read only, as it is a part of a pool
    next: Position


class Reading(NamedTuple):
    """What a loader has done since it was made."""

    bytes: int = 0  # of activations, read from the store
    stall_seconds: float = 0.0  # in which the step waited for rows
    pool_fill: float = 0.0  # of the two pools: rows still to be handed out, and whether the next one is there


class ReadingOrder(NamedTuple):
    """Which chunks each pool holds: a pure function of shapes and seed."""

    shards: int
    chunks_per_shard: int
    window_shards: int
    pool_chunks: int
    seed: int

    @property
    def windows(self) -> int:
        """Windows of an epoch, the last perhaps shorter."""
        return -(-self.shards // self.window_shards)

    def pools(self, window: int) -> int:
        """Pools of a window."""
        return -(-len(self.chunks_of_window(window)) // self.pool_chunks)

    def chunks_of_window(self, window: int) -> np.ndarray:
        """Numbers of the chunks of a window, in stored order, (chunks,)."""
        first = window * self.window_shards
        last = min(first + self.window_shards, self.shards)
        return np.arange(first * self.chunks_per_shard, last * self.chunks_per_shard)

    def chunks(self, at: Position) -> np.ndarray:
        """Numbers of the chunks in a pool, in the order they are read."""
        generator = np.random.default_rng([self.seed, at.epoch, at.window])
        order = generator.permutation(self.chunks_of_window(at.window))
        return order[at.pool * self.pool_chunks : (at.pool + 1) * self.pool_chunks]

    def rows(self, at: Position, kept: int) -> np.ndarray:
        """Permutation of a pool's kept rows."""
        return np.random.default_rng([self.seed, at.epoch, at.window, at.pool]).permutation(kept)

    def next_pool(self, at: Position) -> Position:
        """The first row of the pool after this one, for ever."""
        if at.pool + 1 < self.pools(at.window):
            return Position(at.epoch, at.window, at.pool + 1)
        if at.window + 1 < self.windows:
            return Position(at.epoch, at.window + 1)
        return Position(at.epoch + 1)


class ActivationLoader:
    """Batches of the kept training rows of one hook, for ever, from a position on."""

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        exclude: ExcludeConfig,
        norm_limit: float | None,
        batch_size: int,
        window_shards: int,
        pool_rows: int,
        seed: int,
        pin_memory: bool = False,
        need: Callable[[int], None] | None = None,
    ) -> None:
        """`pin_memory` makes batches that a GPU copies while the host goes on.

        `need(window)` is called before a window is read, for a stream to make it.
        """
        g = store.geometry
        self.store, self.hook, self.exclude, self.norm_limit = store, hook, exclude, norm_limit
        self.batch_size = batch_size
        pool_chunks = max(1, pool_rows // g.chunk_rows)
        self.order = ReadingOrder(
            g.train_shards, g.chunks_per_shard, min(window_shards, g.train_shards), pool_chunks, seed
        )
        self.reading = Reading()
        self._pin_memory, self._need = pin_memory, need
        self._kept: dict[int, np.ndarray] = {}

    def batches(self, start: Position) -> Generator[Batch, None, None]:
        """Batches from `start` on.

        Raises UserError for a damaged chunk, from the thread that reads ahead.
        """
        with ThreadPoolExecutor(1, "store-reader") as reader:
            at, row = start._replace(row=0), start.row
            if self._need:
                self._need(at.window)
            ahead = reader.submit(self._read, at)
            batch, filled = self._empty(self.batch_size), 0  # of parts of two pools
            while True:
                began = time.monotonic()
                pool = ahead.result()
                waited = time.monotonic() - began
                read = pool.untyped_storage().nbytes()  # excluded rows were read too
                self.reading = Reading(self.reading.bytes + read, self.reading.stall_seconds + waited)
                following = self.order.next_pool(at)
                waits = self._need is not None and following.pool == 0  # the next window is made when this one is read
                ahead = ahead if waits else reader.submit(self._read, following)
                while row < len(pool):
                    rows = pool[row : row + self.batch_size - filled]
                    row += len(rows)
                    if len(rows) < self.batch_size:
                        batch[filled : filled + len(rows)] = rows
                        filled += len(rows)
                        if filled < self.batch_size:
                            break
                        rows, batch, filled = batch, self._empty(self.batch_size), 0
                    is_next_there = not waits and ahead.done()
                    self.reading = self.reading._replace(pool_fill=(is_next_there + 1 - row / len(pool)) / 2)
                    yield Batch(rows, at._replace(row=row))
                if waits and self._need:
                    self._need(following.window)
                    ahead = reader.submit(self._read, following)
                at, row = following, 0

    def _empty(self, rows: int) -> Tensor:
        """Room for so many rows, bfloat16 (rows, d_in)."""
        shape = (rows, self.store.geometry.d_in)
        if self._pin_memory:
            return torch.empty(shape, dtype=torch.bfloat16, pin_memory=True)
        return torch.from_numpy(np.empty(shape, np.uint16)).view(torch.bfloat16)  # numpy asks for huge pages

    def _read(self, at: Position) -> Tensor:
        """A pool: its kept rows in their order, bfloat16 (rows, d_in)."""
        chunks = self.order.chunks(at).tolist()
        keep = [self._kept_of_chunk(chunk) for chunk in chunks]
        ends = np.cumsum([kept.sum() for kept in keep])
        place_N = np.empty(ends[-1], np.int64)  # of each kept row, in the order of reading
        place_N[self.order.rows(at, len(place_N))] = np.arange(len(place_N))
        places = np.split(place_N, ends[:-1])
        pool = self._empty(len(chunks) * self.store.geometry.chunk_rows)[: len(place_N)]
        bits_ND = pool.view(torch.uint16).numpy()

        def put(number: int, rows: np.ndarray) -> None:
            kept = keep[number]
            bits_ND[places[number]] = rows if kept.all() else rows[kept]

        self.store.visit_chunks("train", self.hook, chunks, put)
        return pool

    def rows_between(self, start: Position, end: Position) -> np.ndarray:
        """Numbers in the training split of the rows that a batch from `start` to `end` has, (rows,), in its order."""
        chunk_rows, rows, at = self.store.geometry.chunk_rows, [], start
        while True:
            pool = at._replace(row=0)
            last = pool == end._replace(row=0)
            chunks = self.order.chunks(pool)
            numbers = (chunks[:, None] * chunk_rows + np.arange(chunk_rows)).ravel()
            kept = numbers[np.concatenate([self._kept_of_chunk(chunk) for chunk in chunks.tolist()])]
            rows.append(kept[self.order.rows(pool, len(kept))][at.row : end.row if last else None])
            if last:
                return np.concatenate(rows)
            at = self.order.next_pool(pool)

    def describe(self, start: Position, end: Position, count: int = 5) -> str:
        """The rows of largest norm of a batch, in words: where they are in the text, their tokens and norms."""
        shard_N, inside_N = np.divmod(self.rows_between(start, end), self.store.geometry.shard_rows)
        norms = {shard: self.store.read_norms("train", self.hook, shard) for shard in np.unique(shard_N).tolist()}
        norm_N = np.array([norms[s][i] for s, i in zip(shard_N.tolist(), inside_N.tolist(), strict=True)])
        words = []
        for n in np.argsort(-norm_N, kind="stable")[:count].tolist():
            shard, inside = int(shard_N[n]), int(inside_N[n])
            place = {name: int(self.store.read_provenance("train", name, shard)[inside]) for name in PROVENANCE}
            where = f"context {place['context']} position {place['position']} (token {place['token_id']}"
            words.append(f"{where}, norm {norm_N[n]:.4g})")
        return ", ".join(words)

    def _kept_of_chunk(self, chunk: int) -> np.ndarray:
        g = self.store.geometry
        shard, inside = divmod(chunk, g.chunks_per_shard)
        if shard not in self._kept:
            if len(self._kept) >= 2 * self.order.window_shards:  # one bit-mask a row of the windows in reach
                self._kept.clear()
            self._kept[shard] = kept_rows(self.store, "train", self.hook, shard, self.exclude, self.norm_limit)
        return self._kept[shard][inside * g.chunk_rows : (inside + 1) * g.chunk_rows]


def heldout_rows(
    store: ActivationStore, hook: str, exclude: ExcludeConfig, norm_limit: float | None, count: int
) -> Tensor:
    """The first kept held-out rows, bfloat16 (at most count, d_in).

    Raises UserError when the exclusions leave none.
    """
    g = store.geometry
    parts: list[np.ndarray] = []
    for shard in range(g.holdout_shards):
        keep = kept_rows(store, "holdout", hook, shard, exclude, norm_limit)
        for inside in range(g.chunks_per_shard):
            rows = store.read_chunk("holdout", hook, shard * g.chunks_per_shard + inside)
            parts.append(rows[keep[inside * g.chunk_rows : (inside + 1) * g.chunk_rows]])
            if sum(map(len, parts)) >= count:
                return torch.from_numpy(np.concatenate(parts)[:count]).view(torch.bfloat16)
    if not any(map(len, parts)):
        raise UserError(f"{exclude.setting}: {exclude.model_dump()}: leaves no held-out row of {hook}; exclude less")
    return torch.from_numpy(np.concatenate(parts)).view(torch.bfloat16)
