"""Harvest and training by turns, a window of shards at a time: `pipeline stream`.

Each process makes its part of a window, all train on it, and it is deleted (harvest/stream.py). So two windows at
most are on the disk, the one that is being made and the one whose last rows are in the batch before it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from harvest.disk import limit_in_shards
from harvest.files import UserError
from harvest.hub import resolved_commit
from harvest.progress import size_text
from harvest.workers import Workers
from pipeline.config import PipelineConfig
from pipeline.running import run_stage, watched
from pipeline.stages import Begin, Runs
from pipeline.watch import Watch


def stream(sweep: Sequence[Runs], *, allow_mixed: bool) -> None:
    """Train all SAEs of a sweep on rows that are made for them and deleted; a whole store is read as it is.

    Raises UserError for settings that a stream cannot serve, and as the stages do.
    """
    from harvest.stream import is_streamed

    if sweep[0].config.published:
        raise UserError("published: nothing is trained, so there is nothing to stream; `make all` runs these settings")
    made = sweep[0].of("harvest")
    whole = made.is_complete and not is_streamed(made.path)
    if not whole:
        _check(sweep[0].config)
    run = partial(run_stage, sweep, allow_mixed=allow_mixed, force=False, confirm=lambda _: False)
    run("sample")
    run("train", harvest=None if whole else _harvest(sweep, allow_mixed))


def _check(config: PipelineConfig) -> None:
    from pipeline.architecture import find_architecture
    from pipeline.sizes import sizes

    runtime = config.harvest.runtime
    if runtime.store:
        raise UserError(
            f"harvest.runtime.store: {runtime.store}: a stream keeps its rows on a local disk; take this setting out, "
            "or make the whole store (`make harvest`, then `make train`)"
        )
    if runtime.disk_limit is None:
        return
    s = sizes(config, find_architecture(config.model, runtime.offline))
    window, train_shards = config.train.window_shards, s.geometry.train_shards
    least = min(2 * window, train_shards)
    capacity = limit_in_shards(runtime.disk_limit, s.shard, window, train_shards)
    if capacity < least:
        raise UserError(
            f"harvest.runtime.disk_limit: {runtime.disk_limit}: room for {capacity} shards; a stream needs two windows "
            f"of train.window_shards={window}, {least} shards = {size_text(least * s.shard)} = {least * s.shard} bytes"
        )


@contextmanager
def _harvest(sweep: Sequence[Runs], allow_mixed: bool) -> Iterator[Any]:
    """The harvest whose rows training takes: begun as the stage is, and finished when training has ended."""
    from harvest.run import Harvest, store_summary
    from harvest.stream import mark_streamed

    runs, workers = sweep[0], Workers.from_environment()
    config, inputs, made = runs.config, runs.inputs, runs.of("harvest")
    watch = Watch(config, inputs, runs.root, "harvest")
    begin: Begin = partial(made.begin, runs.identity("harvest"), allow_mixed=allow_mixed)
    if workers.rank:
        begin = partial(made.join, allow_mixed=allow_mixed, seconds=config.harvest.runtime.wait_seconds)
    with workers.locked(made.path, "harvest"):
        readers = [each.fingerprints["train"] for each in sweep]
        if workers.rank == 0:
            mark_streamed(made.path, readers)
        arguments = config.model, resolved_commit(inputs.model), config.sample, config.harvest
        harvest = Harvest(*arguments, runs.directory("sample"), made.path, watched(watch, begin))
        yield harvest
        if workers.rank == 0 and not made.is_complete:
            made.finish({**store_summary(harvest.store), "streamed_to": ", ".join(readers)})
            print(f"{'harvest':9} complete  {made.path}", flush=True)
