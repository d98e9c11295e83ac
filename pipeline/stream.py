"""Harvest and training as two processes side by side on a bounded disk: `pipeline stream`.

The processes are those of `pipeline harvest` and `pipeline train --follow`, and meet in the store alone
(harvest/stream.py). This one checks the settings, writes `stream.json`, starts both, shows what they say, and ends
both when one fails.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harvest.disk import limit_in_shards
from harvest.files import UserError, is_locked, locked
from harvest.progress import size_text
from harvest.stage_directory import Run
from pipeline.config import PipelineConfig
from pipeline.running import run_stage
from pipeline.stages import Runs

PDEATHSIG = 1  # of prctl: a child is told when this process dies


class Request(NamedTuple):
    """What the command line asks for."""

    config_file: Path
    overrides: Sequence[str]
    root: Path
    processes: int
    harvest_processes: int | None  # of them; None splits by measured rates
    allow_mixed: bool


def stream(sweep: Sequence[Runs], request: Request, confirm: Callable[[str], bool]) -> None:
    """Make the store and train all SAEs of a sweep from it, at most `harvest.runtime.disk_limit` on the disk.

    Raises UserError for settings that a stream cannot serve, and when one of the two processes fails.
    """
    directory = sweep[0].directory("harvest")
    complete = [runs for runs in sweep if runs.of("train").is_complete]
    if len(complete) == len(sweep):
        for runs in complete:
            runs.of("train").check(read=False)
            print(f"{'train':9} complete  {runs.directory('train')}", flush=True)
        return
    _check(sweep[0].config)
    run_stage(sweep, "sample", allow_mixed=request.allow_mixed, force=False, confirm=confirm)
    harvests, trains = _split(sweep[0].config, request)
    with locked(directory, "stream"):
        whole = Run(directory).is_complete and not (directory / "stream.json").exists()
        if not whole:
            _describe(sweep, directory, harvests, turns=request.processes == 1)
        stages = {"train": trains} if Run(directory).is_complete else {"harvest": harvests, "train": trains}
        _supervise(stages, request)


def _check(config: PipelineConfig) -> None:
    rows = config.sample.shards("train") * config.sample.shard_rows
    asked = config.train.training_tokens or round((config.train.epochs or 0) * rows)
    if asked > rows:
        setting, value = ("training_tokens", asked) if config.train.training_tokens else ("epochs", config.train.epochs)
        raise UserError(
            f"train.{setting}: {value:,}: a stream deletes rows once they were read, so each of the {rows:,} can be "
            "read once only; set train.epochs=1 train.training_tokens=null, raise sample.train_tokens, or keep the "
            "whole store (`make harvest`, then `make train`)"
        )
    if config.harvest.runtime.store:
        raise UserError(
            f"harvest.runtime.store: {config.harvest.runtime.store}: a stream bounds a local disk; take this setting "
            "out, or let `train --follow` read from the bucket while the harvest writes"
        )


def _describe(sweep: Sequence[Runs], directory: Path, harvests: int, turns: bool) -> None:
    """Write stream.json.

    Raises UserError for a limit that is missing or too small, and for a stream of other readers.
    """
    from harvest.activation_store import ActivationStore
    from harvest.store_place import files_of
    from harvest.stream import Stream, load_stream, save_stream

    if is_locked(directory, "harvest"):
        raise UserError(
            f"{directory}: a harvest is running there already; wait for it or stop it, then start the stream"
        )
    capacity = _capacity(sweep[0].config, harvests)
    readers = tuple(runs.fingerprints["train"] for runs in sweep)
    before = load_stream(directory)
    if before and set(before.readers) != set(readers) and ActivationStore.open(files_of(directory)).consumed():
        raise UserError(
            f"{directory}: is a stream for {', '.join(before.readers)}, which has deleted rows already; these "
            f"settings are {', '.join(readers)}. Go on with the settings that it was begun with, or start anew with "
            "`python -m pipeline harvest --force`, which makes the whole store"
        )
    save_stream(directory, Stream(readers, capacity, turns))


def _capacity(config: PipelineConfig, harvests: int) -> int:
    """Training shards that the limit allows."""
    from pipeline.architecture import find_architecture
    from pipeline.sizes import sizes

    s = sizes(config, find_architecture(config.model, config.harvest.runtime.offline))
    g, window = s.geometry, min(config.train.window_shards, s.geometry.train_shards)
    least = min(2 * window + harvests, g.train_shards)
    size = f"{least} shards = {size_text(least * s.shard)} = {least * s.shard} bytes"
    needs = f"two windows of train.window_shards={config.train.window_shards} and one shard a worker, {size}"
    limit = config.harvest.runtime.disk_limit
    if limit is None:
        raise UserError(
            f"harvest.runtime.disk_limit: not set: a stream needs it, at least {needs}; the whole training store takes "
            f"{size_text(s.store - s.holdout)}"
        )
    capacity = limit_in_shards(limit, s.shard, config.train.window_shards, g.train_shards)
    if capacity < least:
        raise UserError(f"harvest.runtime.disk_limit: {limit}: room for {capacity} shards; a stream needs {needs}")
    return capacity


def _split(config: PipelineConfig, request: Request) -> tuple[int, int]:
    """Processes of the harvest, and of training; one of each shares the one device."""
    if request.processes == 1:
        return 1, 1
    if request.harvest_processes is not None:
        if not 0 < request.harvest_processes < request.processes:
            raise UserError(
                f"--harvest-processes {request.harvest_processes}: of --processes {request.processes}, at least one "
                "must be left on each side"
            )
        return request.harvest_processes, request.processes - request.harvest_processes
    harvests = 1 if request.processes == 2 else _measured_split(config, request)
    return harvests, request.processes - harvests


def _measured_split(config: PipelineConfig, request: Request) -> int:
    from pipeline.architecture import find_architecture
    from pipeline.measure import measure
    from pipeline.sizes import sizes

    shape = find_architecture(config.model, config.harvest.runtime.offline)
    s = sizes(config, shape)
    here = measure(config, s, request.root)
    if here.forward is None or here.step is None:
        raise UserError("--harvest-processes: the rates of harvest and training could not be measured here; set it")
    return balanced(request.processes, 1 / here.forward, here.step * s.saes / config.train.batch_size)


def balanced(processes: int, harvest_seconds: float, train_seconds: float) -> int:
    """Of so many processes, those for the harvest, so that the slower side is as fast as can be.

    Seconds are those of one process for a token.
    """
    return min(range(1, processes), key=lambda n: max(harvest_seconds / n, train_seconds / (processes - n)))


def _supervise(stages: dict[str, int], request: Request) -> None:
    """Run the processes to their end; when one fails, or at Ctrl-C, let the others save their place and stop."""
    children: dict[str, subprocess.Popen[str]] = {}
    relays: list[threading.Thread] = []
    try:
        first = 0
        for stage, count in stages.items():
            children[stage] = _start(stage, count, first, len(stages) > 1, request)
            relays.append(threading.Thread(target=_relay, args=(children[stage],), daemon=True))
            relays[-1].start()
            first += count
        while None in (ended := [child.poll() for child in children.values()]) and not any(ended):
            time.sleep(0.1)
        failed = {stage: child.returncode for stage, child in children.items() if child.returncode}
    finally:  # each of them gets the signal once: a second would not wait for a checkpoint
        for child in children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in children.values():
            child.wait()
        for relay in relays:
            relay.join()
    for stage, status in failed.items():
        raise UserError(_failure(stage, status))


def _failure(stage: str, status: int) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return (
        f"stream: the {stage} process {how}; the other one was stopped and kept its place. Run the same command "
        "again to go on where both are"
    )


def _start(stage: str, count: int, first: int, shared: bool, request: Request) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"] if count > 1 else []
    follow = ["--follow"] if stage == "train" else []
    mixed = ["--allow-mixed"] if request.allow_mixed else []
    options = ["--config", str(request.config_file), "--runs", str(request.root), *follow, *mixed]
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"}
    if shared and request.processes > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(request.processes)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + count])
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "pipeline", stage, *options, *request.overrides],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,  # Ctrl-C on the terminal comes here alone
        preexec_fn=lambda: ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM),
    )


def _relay(child: subprocess.Popen[str]) -> None:
    """Show a child's lines: two progress bars on one terminal would write over each other."""
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", file=sys.stderr, flush=True)
