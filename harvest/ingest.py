"""A harvest without a model: activations that the user gives become the store.

Contexts are put into a random order, the first of them held out; then a shard is a run of rows of that
order, permuted as a harvest's shards are. So it is a pure function of files and settings, and a restart
goes on at the first missing shard. Only the rows of three shards are in memory, and about 30 bytes for
each context.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from harvest.activation_store import SPLITS, ActivationStore, Geometry, ShardRows
from harvest.config import IngestConfig
from harvest.device import numerics
from harvest.disk import check_room
from harvest.files import Stamp, UserError, file_stamp
from harvest.given_rows import GivenRows, look_through
from harvest.progress import Progress
from harvest.run import store_summary
from harvest.sources import files_within, ingest_files
from harvest.stage_directory import Run

TYPES = {"token_id": np.uint32, "context": np.uint32, "position": np.uint16}


class Order(NamedTuple):
    """Contexts (or blocks) of a split in the order that they are stored, and where each ends among its rows."""

    contexts: np.ndarray
    ends: np.ndarray

    @property
    def rows(self) -> int:
        """Rows of the split."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, bounds: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(context, first row, end row) of the rows from `start` to `stop` of the order, by place in the files.

        Shards are permuted anyway, so reading may follow the files.
        """
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        out = []
        for i in range(int(first), int(last) + 1):
            context, end = int(self.contexts[i]), int(self.ends[i])
            begin = end - int(bounds[context + 1] - bounds[context])
            offset = int(bounds[context]) - begin
            out.append((context, offset + max(begin, start), offset + min(end, stop)))
        return sorted(out)


def run(config: IngestConfig, directory: Path, begin: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Write `directory/store`, continuing at the first missing shard, and return the summary.

    Raises UserError for files that cannot be used, with the file's name, and for a NaN or infinity, with the row's.
    """
    paths = ingest_files(config)
    stamps = {file: file_stamp(file) for path in (*paths[0], *paths[1]) for file in files_within(path)}
    given = look_through(config, *paths)
    orders = split(given, config)
    begin(numerics(torch.device("cpu"), torch.bfloat16))
    shards = {name: order.rows // config.shard_rows for name, order in orders.items()}
    geometry = Geometry(
        hooks=tuple(given.acts),
        d_in=given.d_in,
        context_size=1,  # shards hold rows; contexts are of any size and may lie in two
        shard_contexts=config.shard_rows,
        chunk_rows=config.chunk_rows,
        train_shards=shards["train"],
        holdout_shards=shards["holdout"],
        stored=config.stored,
    )
    left_out = given.rows - sum(shards.values()) * config.shard_rows
    _warn_of_shards(config, given.rows, shards["holdout"] * config.shard_rows, left_out)
    about = {"seed": config.seed, "model": None, "fingerprint": directory.name, "numerics": Run(directory).numerics}
    ingested = {"absent": given.absent, "context_size": given.context_size}
    store = ActivationStore.create(directory / "store", geometry, {**about, "ingested": ingested})
    store.files.sweep(alone=True)
    every = [(name, shard) for name in ("holdout", "train") for shard in range(shards[name])]
    done = {(name, shard) for name in SPLITS for shard in store.complete_shards(name)}
    check_room(directory, len(every) - len(done), geometry, "name fewer files in ingest.path")
    total, start = len(every) * config.shard_rows, len(done) * config.shard_rows
    with (
        Progress("ingest", total, "rows", start=start, path=directory / "progress.json") as progress,
        ThreadPoolExecutor(1, "store-writer") as writer,
    ):
        writing: Future[None] | None = None
        for name, shard in every:
            if (name, shard) in done:
                continue
            rows = shard_rows(given, orders[name], name, shard, config)
            _check_unchanged(stamps)  # the files are mapped: what is written into them now is in these rows
            if writing:
                writing.result()  # one shard is written while the next is read; never more wait
            writing = writer.submit(store.write_shard, name, shard, rows)
            progress.advance(config.shard_rows)
        if writing:
            writing.result()
    return {**store_summary(store), "rows_left_out": left_out, "files": len(paths[0])}


def _warn_of_shards(config: IngestConfig, rows: int, heldout: int, left_out: int) -> None:
    if heldout > 2 * config.holdout_fraction * rows or left_out > rows / 10:
        print(
            f"ingest: warning: of {rows:,} rows {rows - heldout - left_out:,} are for training, {heldout:,} held out "
            f"({heldout / rows:.0%}; ingest.holdout_fraction is {config.holdout_fraction:.0%}), {left_out:,} left out, "
            f"as splits hold whole shards of ingest.shard_rows = {config.shard_rows:,} rows; lower it to use more rows",
            flush=True,
        )


def split(given: GivenRows, config: IngestConfig) -> dict[str, Order]:
    """Contexts of each split in a random order; those of one number in a column `context` fall on one side.

    Raises UserError when the rows do not fill a shard of each.
    """
    rows, lengths = given.rows, np.diff(given.bounds)
    _, number = np.unique(given.numbers, return_inverse=True)
    generator = np.random.default_rng(config.seed)
    wanted = max(1, round(config.holdout_fraction * rows / config.shard_rows)) * config.shard_rows
    by_chance = generator.permutation(int(number.max()) + 1)
    filled = np.cumsum(np.bincount(number, weights=lengths)[by_chance])
    held = np.zeros(len(by_chance), bool)
    held[by_chance[: int(np.searchsorted(filled, wanted)) + 1]] = True
    order = generator.permutation(len(lengths))
    orders = {}
    for name, side in zip(SPLITS, (~held, held), strict=True):
        contexts = order[side[number[order]]]
        orders[name] = Order(contexts, np.cumsum(lengths[contexts]))
        if orders[name].rows < config.shard_rows:
            raise UserError(
                f"ingest.path: {config.path!r}: {rows:,} rows in {len(filled):,} contexts (or blocks) leave "
                f"{orders[name].rows:,} for the {name} split, less than a shard of ingest.shard_rows = "
                f"{config.shard_rows:,}; lower it, or give more rows"
            )
    return orders


def _check_unchanged(stamps: dict[Path, Stamp]) -> None:
    for path, stamp in stamps.items():
        if not path.exists() or file_stamp(path) != stamp:
            raise UserError(
                f"{path}: has changed while it was read; no shard was written of it since. Run the same command again "
                "once it is as it should be"
            )


def shard_rows(given: GivenRows, order: Order, split: str, shard: int, config: IngestConfig) -> ShardRows:
    """All rows of a shard in their stored order, as bfloat16.

    Raises UserError for a NaN or infinity, with file and row.
    """
    rows = config.shard_rows
    pieces = order.pieces(given.bounds, shard * rows, (shard + 1) * rows)
    permuted = np.random.default_rng([config.seed, SPLITS.index(split), shard]).permutation(rows)
    acts, norms = {}, {}
    for hook, given_acts in given.acts.items():
        laid = torch.empty(rows, given.d_in, dtype=torch.bfloat16)
        at = 0
        for _, start, stop in pieces:
            part = laid[at : at + stop - start]
            part.copy_(given_acts.read(start, stop))
            finite = torch.isfinite(part).all(1)
            if not finite.all():
                path, row = given_acts.place(start + int(finite.logical_not().nonzero()[0]))
                raise UserError(
                    f"{path}: NaN or infinity (as bfloat16) in {hook!r} at row {row}; nothing of this shard was "
                    "written. Mend the file or leave the row out"
                )
            at += stop - start
        laid = laid[torch.from_numpy(permuted)]
        norms[hook] = laid.float().norm(dim=1).numpy()
        acts[hook] = laid.view(torch.uint16).numpy()
    # Where the rows come from: what the files say; else the number of the context and the place in it.
    parts = {
        "token_id": [np.zeros(stop - start) for _, start, stop in pieces],
        "context": [np.full(stop - start, given.numbers[context]) for context, start, stop in pieces],
        "position": [np.arange(start, stop) - given.bounds[context] for context, start, stop in pieces],
    }
    for name, column in given.columns.items():
        parts[name] = [column.numbers(start, stop) for _, start, stop in pieces]
    columns = {name: np.concatenate(part).astype(TYPES[name])[permuted] for name, part in parts.items()}
    return ShardRows(acts, norms, columns["token_id"], columns["context"], columns["position"])
