"""What a settings file needs before anything starts: disk, memory, hours, the rate at which training reads.

Sizes are arithmetic; times come from `pipeline/measure.py`, and where no GPU is at hand also from what one
H100 did, marked as such. Nothing is refused here; what will not fit is said.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harvest.progress import duration, size_text
from pipeline.architecture import Architecture, find_architecture
from pipeline.config import PipelineConfig
from pipeline.measure import Measured, measure
from pipeline.sizes import Sizes, sizes

# Of one H100, for where no GPU is at hand: the part of the 798 TFLOP/s of its matrix products that 20 layers of the 8B
# shape reach, eager and compiled, writing included, and the sparse step of 14.2 ms at 4,096 rows, d_in 4,096, 65,536
# features and an L0 of 86 (benchmarks/results.md).
H100_PEAK = 798e12
H100_PART = {False: 0.57, True: 0.71}
H100_STEP = 0.0142 / (4096 * 4096 * 65_536)
H100_D_IN = 2048  # smaller products do not come near that rate: narrower models stay below
H100_MEMORY = 80 * 10**9
MARGIN = 0.9  # of the free memory; the rest is for fragments and the libraries
SWEEP = 5  # SAEs of the sweep in the comparison


class Speed(NamedTuple):
    """How fast one machine is; None where nothing is known."""

    machine: str
    is_gpu: bool
    forward: float | None  # tokens/s
    step: float | None  # seconds, one SAE
    memory: int  # bytes for model, SAE and batches
    element: int  # bytes of a weight in the forward pass
    write: float | None  # bytes/s of its disk; None does not limit it
    read: float | None
    forward_how: str
    step_how: str


class Memory(NamedTuple):
    """Bytes of device memory that the stages take on one machine; arithmetic."""

    free: int
    harvest: int
    largest_batch: int  # contexts of a forward pass that fit
    train: int  # SAEs, Adam and a batch

    @classmethod
    def of(cls, config: PipelineConfig, s: Sizes, speed: Speed) -> "Memory":
        """For these settings on a machine."""
        g, train = s.geometry, config.train
        fixed = s.parameters * speed.element + g.shard_rows * g.d_in * 2 * (3 + len(g.hooks))
        context = s.context * speed.element // 4
        # Weights, gradients and two moments of Adam, copies for the products; then what a dense step makes of a batch.
        training = s.saes * s.sae // 4 * (16 + 2) + 13 * train.batch_size * s.d_sae + 2 * g.d_in * train.validation_rows
        return cls(
            speed.memory,
            fixed + config.harvest.batch_contexts * context,
            largest_batch(g.shard_contexts, MARGIN * speed.memory - fixed, context),
            training,
        )

    @property
    def holds_stream(self) -> bool:
        """Whether both sides of a stream fit at once."""
        return self.harvest + self.train <= MARGIN * self.free

    def obstacles(self, batch_contexts: int) -> list[str]:
        """What does not fit."""
        batch = f"harvest.batch_contexts={batch_contexts}" if batch_contexts > self.largest_batch else ""
        training = "training" if self.train > MARGIN * self.free else ""
        return [f"{what} does not fit into {size_text(self.free)}" for what in (batch, training) if what]


class Way(NamedTuple):
    """One way to feed an SAE with activations."""

    name: str
    disk: int  # bytes of activations
    tokens: int  # that the model reads for one SAE
    each_pays: bool  # whether every SAE of a sweep has forward passes of its own
    note: str


def estimate(config: PipelineConfig, root: Path) -> Iterator[str]:
    """Lines of the plan for these settings; takes about ten seconds, and leaves nothing in the runs folder.

    Raises UserError when the model's shape cannot be had or a hook is not in it.
    """
    shape = find_architecture(config.model, config.harvest.runtime.offline)
    s = sizes(config, shape)
    measured = measure(config, shape, s.layers, root)
    yield from plan(config, shape, s, measured, shutil.disk_usage(root).free, root)


def plan(
    config: PipelineConfig, shape: Architecture, s: Sizes, measured: Measured, free: int, root: Path
) -> Iterator[str]:
    """The lines, from sizes and measurements."""
    g, train = s.geometry, config.train
    kept = s.trained(train.runtime.keep_last, s.saes)
    remote = config.harvest.runtime.store
    total = 2 * s.contexts + (0 if remote else s.store) + kept
    rows = g.train_shards * g.shard_rows
    yield f"model    {config.model.name}: {s.layers} decoder layers are run, d_in {g.d_in:,} ({shape.origin})"
    yield (
        f"budget   {rows:,} training tokens in {g.train_shards:,} shards, {g.holdout_shards:,} shards held out; "
        f"{s.steps:,} steps of {train.batch_size:,} rows = {s.steps * train.batch_size / rows:.2f} epochs; "
        f"{len(g.hooks)} hook(s) x {s.saes} SAE(s) of up to {s.d_sae:,} features"
    )
    yield ""
    yield from _table(
        ("disk", ""),
        ("contexts", f"{size_text(2 * s.contexts)} while sampling, then {size_text(s.contexts)}"),
        ("store, train", f"{size_text(s.store - s.holdout)}, {size_text(s.shard)} a shard"),
        ("store, held out", size_text(s.holdout)),
        ("SAEs, checkpoints", f"{size_text(kept)}, {size_text(s.checkpoint)} a checkpoint"),
        ("in all", f"{size_text(total)}; free in {root}: {size_text(free)}"),
        *([("not counted", f"the store, which lies in {remote}; rates below are of the disk")] if remote else []),
        ("write, read", f"{_rate(measured.disk_write.value)}, {_rate(measured.disk_read.value)}"),
        ("", measured.disk_read.how),
    )
    limited = config.harvest.runtime.disk_limit is not None and not remote
    needed = total - s.store + streamed_bytes(config, s) if limited else total
    lacks = [f"the disk of {root} lacks {size_text(needed - free)}"] if needed > free else []
    for obstacle in lacks:
        yield f"warning: {obstacle}{'' if remote else '; harvest will refuse to start'}"
    streams = limited and total > free >= needed
    if streams:
        yield f"warning: the disk of {root} has room for `make stream` alone, which keeps harvest.runtime.disk_limit"
    here, *elsewhere = speeds(config, s, measured)
    for speed in (here, *elsewhere):
        yield ""
        yield from _machine(config, s, measured, speed)
    yield ""
    yield (
        "not measured: tokenizing, downloads of the model and the text, evaluation, several GPUs; memory is arithmetic"
    )
    memory = Memory.of(config, s, here)
    obstacles = lacks + memory.obstacles(config.harvest.batch_contexts)
    if streams and not memory.holds_stream:
        obstacles.append(f"a stream does not fit into {size_text(memory.free)}")
    stored = (g.train_shards + g.holdout_shards) * g.shard_rows
    harvest, training = harvest_seconds(s, here, stored, True), train_seconds(config, s, here, s.saes, True)
    taken = f"harvest {_hours(harvest)}, training {_hours(training)}; {size_text(needed)} of disk"
    yield f"in short, on this machine: {'; '.join(obstacles) or 'it fits'}; {taken}"


def speeds(config: PipelineConfig, s: Sizes, measured: Measured) -> list[Speed]:
    """This machine, and where no GPU is at hand an H100 as it was measured elsewhere."""
    train = config.train
    dense, sparse = measured.dense_step.value, measured.sparse_step.value
    part = {"dense": 1.0, "sparse": 0.0, "auto": train.l1_warmup_fraction}[train.kernel]
    step = None if dense is None or sparse is None else part * dense + (1 - part) * sparse
    how = f"{measured.sparse_step.how}; {part:.0%} of the steps dense"
    write, read = measured.disk_write.value, measured.disk_read.value
    here = Speed(
        measured.device,
        measured.is_gpu,
        measured.forward.value,
        step,
        measured.memory,
        measured.element,
        write,
        read,
        measured.forward.how,
        how,
    )
    if measured.is_gpu or s.geometry.d_in < H100_D_IN:
        return [here]
    work = train.batch_size * s.geometry.d_in * s.d_sae
    elsewhere = Speed(
        "one H100 (as measured on the 8B shape, not here)",
        True,
        H100_PART[config.harvest.compile] * H100_PEAK / s.flop_per_token,
        H100_STEP * work,
        H100_MEMORY,
        2,
        None,
        None,
        f"{H100_PART[config.harvest.compile]:.0%} of 798 TFLOP/s",
        "14.2 ms at 4,096 rows x 4,096 x 65,536, in proportion",
    )
    return [here, elsewhere]


def _machine(config: PipelineConfig, s: Sizes, measured: Measured, speed: Speed) -> Iterator[str]:
    g, train = s.geometry, config.train
    memory, batch = Memory.of(config, s, speed), config.harvest.batch_contexts
    pools = 2 * 2 * g.d_in * train.pool_rows
    written = None if speed.forward is None else speed.forward * s.shard / g.shard_rows
    wanted = None if speed.step is None else train.batch_size / (speed.step * s.saes) * 2 * g.d_in
    yield from _table(
        (speed.machine, ""),
        ("forward", f"{_per_second(speed.forward)}; {speed.forward_how}"),
        ("a training step", f"{_seconds(speed.step)}; {speed.step_how}"),
        (
            "memory, harvest",
            f"{size_text(memory.harvest)} of {size_text(memory.free)} free",
        ),
        ("batch_contexts", f"{batch} set; the largest that fits: {memory.largest_batch or 'none'}"),
        (
            "memory, train",
            f"{size_text(memory.train)} for SAEs, Adam and a batch; pools {size_text(pools)} in host memory",
        ),
        (
            "memory, stream",
            f"{size_text(memory.harvest + memory.train)} on one device: the model and the SAEs",
        ),
        ("harvest writes", f"{_rate(written)}; the disk here: {_rate(measured.disk_write.value)}"),
        ("training reads", f"{_rate(wanted)}; the disk here: {_rate(measured.disk_read.value)}"),
    )
    obstacles = memory.obstacles(batch)
    for obstacle in obstacles:
        yield f"warning: {obstacle}"
    if not obstacles and not memory.holds_stream:
        yield f"warning: a stream does not fit into {size_text(memory.free)}"
    if _slower(measured.disk_write.value, written):
        yield "warning: the harvest would be bound by the disk here"
    if _slower(measured.disk_read.value, wanted):
        yield "warning: training would be bound by the disk here"
    yield from _table(*ways(config, s, speed))


def ways(config: PipelineConfig, s: Sizes, speed: Speed) -> list[tuple[str, ...]]:
    """Disk and hours of the three ways to feed an SAE, for one and for a sweep of five, on one such machine."""
    g, train = s.geometry, config.train
    heldout = g.holdout_shards * g.shard_rows
    stored, seen = g.train_shards * g.shard_rows, s.steps * train.batch_size
    kept = s.contexts + s.trained(train.runtime.keep_last, 1)
    hours = f"{'GPU hours' if speed.is_gpu else 'hours'} of one such machine"
    rows: list[tuple[str, ...]] = [(hours, "disk, one SAE", "one SAE", f"{SWEEP} SAEs", "")]
    for way in (
        Way("full store", s.store, stored + heldout, False, "any further SAE trains from it"),
        Way(
            "stream",
            streamed_bytes(config, s),
            seen + heldout,
            False,
            "two windows; every epoch pays the forward passes again",
        ),
        Way("regenerate in a buffer", 0, seen, True, "as others do: every SAE pays the forward passes again"),
    ):
        taken = []
        for saes in (1, SWEEP):
            harvest = harvest_seconds(s, speed, way.tokens, way.disk > 0)
            training = train_seconds(config, s, speed, saes, way.disk > 0)
            passes = saes if way.each_pays else 1
            taken.append(None if harvest is None or training is None else passes * harvest + training)
        rows.append((f"  {way.name}", size_text(way.disk + kept), *map(_hours, taken), way.note))
    return rows


def streamed_bytes(config: PipelineConfig, s: Sizes) -> int:
    """Bytes of activations that a stream has on the disk at once: held-out ones and two windows."""
    return s.holdout + min(2 * config.train.window_shards, s.geometry.train_shards) * s.shard


def harvest_seconds(s: Sizes, speed: Speed, tokens: int, stores: bool) -> float | None:
    """Seconds of the forward passes of so many tokens, or of writing them where that takes longer."""
    if speed.forward is None:
        return None
    writing = tokens * s.shard / s.geometry.shard_rows / speed.write if stores and speed.write else 0.0
    return max(tokens / speed.forward, writing)


def train_seconds(config: PipelineConfig, s: Sizes, speed: Speed, saes: int, reads: bool) -> float | None:
    """Seconds of training so many SAEs of every hook from one reading, checkpoints included."""
    if speed.step is None:
        return None
    reading = s.steps * config.train.batch_size * 2 * s.geometry.d_in / speed.read if reads and speed.read else 0.0
    saving = (
        s.steps // config.train.runtime.checkpoint_every * saes * s.checkpoint / speed.write if speed.write else 0.0
    )
    return len(s.geometry.hooks) * (max(s.steps * saes * speed.step, reading) + saving)


def largest_batch(shard_contexts: int, memory: float, context: int) -> int:
    """The largest divisor of the contexts of a shard that fits; 0 if none does."""
    fitting = [k for k in range(1, shard_contexts + 1) if shard_contexts % k == 0 and k * context <= memory]
    return max(fitting, default=0)


def _slower(disk: float | None, wanted: float | None) -> bool:
    return disk is not None and wanted is not None and disk < wanted


def _table(*rows: Sequence[str]) -> Iterator[str]:
    """Aligned columns; the first row is a heading."""
    columns = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(columns)]
    for n, row in enumerate(rows):
        indent = "" if not n or columns > 2 else "  "
        yield (indent + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False))).rstrip()


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{size_text(value)}/s"


def _per_second(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g} tokens/s" if value < 1000 else f"{value:,.0f} tokens/s"


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value * 1000:,.3g} ms" if value < 1 else f"{value:,.1f} s"


def _hours(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 86400:,.0f} days" if value > 10 * 86400 else duration(value)
