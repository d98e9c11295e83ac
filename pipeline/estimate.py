"""What a settings file needs before anything starts: disk, memory, hours, the rate at which training reads.

Sizes and memory are arithmetic; times come from pipeline/measure.py, and where no GPU is at hand also from what one
H100 did, marked as such. Nothing is refused here; what will not fit is said.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from evaluate.activity import room
from harvest.progress import size_text
from pipeline.architecture import Architecture, find_architecture
from pipeline.benchmark_cost import benchmark_lines
from pipeline.config import PipelineConfig
from pipeline.measure import FORWARD_PART, Machine, measure
from pipeline.memory import harvest_memory, pinned_pools, training_memory
from pipeline.sizes import Sizes, sizes
from pipeline.tables import hours, table


class Known(NamedTuple):
    """A machine that was measured elsewhere (benchmarks/results.md)."""

    name: str
    flops: float  # of its matrix products
    step: float  # seconds of a sparse step for each row x d_in x d_sae
    least_d_in: int  # smaller products do not come near these rates
    memory: int


H100_STEP = 0.0142 / (4096 * 4096 * 65_536)  # at an L0 of 86
KNOWN = [Known("one H100 (as measured on the 8B shape, not here)", 797e12, H100_STEP, 2048, 80 * 10**9)]
MARGIN = 0.9  # of the free memory; the rest is for fragments and the libraries
SWEEP = 5  # SAEs of the sweep in the comparison


def estimate(config: PipelineConfig, root: Path) -> Iterator[str]:
    """Lines of the plan for these settings; takes about ten seconds, and leaves nothing in the runs folder.

    Raises UserError when the model's shape cannot be had or a hook is not in it.
    """
    shape = find_architecture(config.model, config.harvest.runtime.offline)
    s = sizes(config, shape)
    here = measure(config, s, root)
    lines = plan_published if config.published else plan
    yield from lines(config, shape, s, here, shutil.disk_usage(root).free, root)
    if config.benchmark:
        yield from _section("benchmark", *benchmark_lines(config.benchmark, shape, here))


def plan(config: PipelineConfig, shape: Architecture, s: Sizes, here: Machine, free: int, root: Path) -> Iterator[str]:
    """The lines, from sizes and measurements; `free` bytes are left on the disk of `root`."""
    g, train, runtime = s.geometry, config.train, config.harvest.runtime
    total = 2 * s.contexts + (0 if runtime.store else s.store) + s.trained(s.saes)
    kinds = "; ".join(dict.fromkeys(single.sae.said() for single in train.expanded()))
    yield f"model    {config.model.name}: {s.layers} decoder layers are run, d_in {g.d_in:,} ({shape.origin})"
    yield (
        f"budget   {s.rows:,} training tokens in {g.train_shards:,} shards, {g.holdout_shards:,} shards held out; "
        f"{s.steps:,} steps of {train.batch_size:,} rows = {s.steps * train.batch_size / s.rows:.2f} epochs; "
        f"{len(g.hooks)} hook(s) x {s.saes} SAE(s) of up to {s.d_sae:,} features: {kinds}"
    )
    yield from _section(
        "disk",
        ("contexts", f"{size_text(2 * s.contexts)} while sampling, then {size_text(s.contexts)}"),
        ("store, train", f"{size_text(s.store - s.holdout)}, {size_text(s.shard)} a shard"),
        ("store, held out", size_text(s.holdout)),
        ("SAEs, checkpoints", f"{size_text(s.trained(s.saes))}, {size_text(s.checkpoint)} a checkpoint"),
        *_activity(config, s),
        ("in all", f"{size_text(total)}; free in {root}: {size_text(free)}"),
        *([("not counted", f"the store, which lies in {runtime.store}")] if runtime.store else []),
    )
    bounded = runtime.disk_limit is not None and not runtime.store
    needed = total - s.store + streamed_bytes(config, s) if bounded else total
    obstacles = [f"the disk of {root} lacks {size_text(needed - free)}"] if needed > free else []
    for obstacle in obstacles:
        yield f"warning: {obstacle}{'' if runtime.store else '; harvest will refuse to start'}"
    if bounded and total > free >= needed:
        yield f"warning: the disk of {root} has room for `make stream` alone, which keeps harvest.runtime.disk_limit"
    for machine in (here, *([] if here.is_gpu else _elsewhere(config, s))):
        yield from _machine(config, s, here, machine)
    yield ""
    yield "not measured: tokenizing, downloads of the model and the text, evaluation, several GPUs"
    obstacles += _too_large(config, s, here)
    harvest = harvest_seconds(s, here, s.rows + g.holdout_shards * g.shard_rows)
    taken = f"harvest {hours(harvest)}, training {hours(train_seconds(config, s, here, s.saes))}"
    yield f"in short, on this machine: {'; '.join(obstacles) or 'it fits'}; {taken}; {size_text(needed)} of disk"


def plan_published(
    config: PipelineConfig, shape: Architecture, s: Sizes, here: Machine, free: int, root: Path
) -> Iterator[str]:
    """The lines where an SAE of others is in the place of training: the held-out rows are all that is made."""
    g, batch = s.geometry, config.harvest.batch_contexts
    in_bucket = config.harvest.runtime.store
    total, tokens = 2 * s.contexts + (0 if in_bucket else s.store), g.holdout_shards * g.shard_rows
    yield f"model    {config.model.name}: {s.layers} decoder layers are run, d_in {g.d_in:,} ({shape.origin})"
    yield f"budget   {tokens:,} held-out tokens in {g.holdout_shards:,} shards; nothing is trained"
    yield from _section(
        "disk",
        ("contexts", f"{size_text(2 * s.contexts)} while sampling, then {size_text(s.contexts)}"),
        ("store, held out", f"{size_text(s.store)}{f', in {in_bucket}' if in_bucket else ''}"),
        ("in all", f"{size_text(total)}; free in {root}: {size_text(free)}"),
    )
    memory = {}
    for machine in (here, *([] if here.is_gpu else _elsewhere(config, s))):
        memory[machine.name] = harvest_memory(s, machine).of(batch)
        yield from _section(
            machine.name,
            ("rates", f"forward {_number(machine.forward, 'tokens/s')}; {machine.note}"),
            ("memory, harvest", f"{size_text(memory[machine.name])} of {size_text(machine.memory)} free"),
            ("harvest", hours(harvest_seconds(s, machine, tokens))),
        )
    yield ""
    yield "not measured: tokenizing, downloads of the model, the text and the SAE, evaluation and its memory"
    obstacles = [f"the disk of {root} lacks {size_text(total - free)}"] if total > free else []
    fits = memory[here.name] <= MARGIN * here.memory
    obstacles += [] if fits else [f"harvest.batch_contexts={batch} does not fit into {size_text(here.memory)}"]
    yield (
        f"in short, on this machine: {'; '.join(obstacles) or 'it fits'}; "
        f"harvest {hours(harvest_seconds(s, here, tokens))}; {size_text(total)} of disk"
    )


def _activity(config: PipelineConfig, s: Sizes) -> list[tuple[str, str]]:
    """What evaluation keeps of every feature; far less than this where features are sparse, so it is not added up."""
    features, g = config.evaluate.features, s.geometry
    if not features or not s.d_sae:
        return []
    text = g.holdout_shards * g.shard_contexts, g.context_size
    fits = room(s.d_sae, len(config.sample.sources), text, features)
    kept = f"{fits.strongest} strongest and {fits.sampled} drawn excerpts of each feature"
    more = f"; evaluate.features.activity_bytes={fits.bytes_wanted} keeps {' and '.join(map(str, fits.wanted))}"
    at_most = f"{size_text(fits.bytes)} at most for each SAE, on the disk and in memory: {kept}"
    return [("activity", at_most + (more if fits.bytes < fits.bytes_wanted else ""))]


def _elsewhere(config: PipelineConfig, s: Sizes) -> Iterator[Machine]:
    for known in KNOWN:
        if s.geometry.d_in >= known.least_d_in:
            forward = FORWARD_PART[config.harvest.compile] * known.flops / s.flop_per_token
            step = known.step * config.train.batch_size * s.geometry.d_in * s.d_sae if config.train else None
            yield Machine(known.name, True, 2, known.memory, None, None, forward, step, "in proportion to the work")


def _largest_batch(s: Sizes, machine: Machine) -> int:
    return harvest_memory(s, machine).largest(s.geometry.shard_contexts, MARGIN * machine.memory)


def _too_large(config: PipelineConfig, s: Sizes, machine: Machine) -> list[str]:
    train, largest = training_memory(config.train, s, machine), _largest_batch(s, machine)
    batch = config.harvest.batch_contexts
    found = {f"harvest.batch_contexts={batch}": batch > largest, "training": train > MARGIN * machine.memory}
    return [f"{what} does not fit into {size_text(machine.memory)}" for what, holds in found.items() if holds]


def _machine(config: PipelineConfig, s: Sizes, here: Machine, machine: Machine) -> Iterator[str]:
    g, train, batch = s.geometry, config.train, config.harvest.batch_contexts
    harvest, training = harvest_memory(s, machine).of(batch), training_memory(train, s, machine)
    largest, pools = _largest_batch(s, machine), size_text(pinned_pools(train, s, machine))
    written = machine.forward and machine.forward * s.shard / g.shard_rows
    wanted = machine.step and train.batch_size / (machine.step * s.saes) * 2 * g.d_in
    forward, step = _number(machine.forward, "tokens/s"), _number(machine.step and 1000 * machine.step, "ms")
    yield from _section(
        machine.name,
        ("rates", f"forward {forward}, a training step {step}; {machine.note}"),
        ("memory, harvest", f"{size_text(harvest)} of {size_text(machine.memory)} free"),
        ("batch_contexts", f"{batch} set; the largest that fits: {largest or 'none'}"),
        ("memory, train", f"{size_text(training)} for SAEs, Adam and a batch; pools {pools} in host memory"),
        ("harvest writes", f"{_rate(written)}; the disk here: {_rate(here.write)}"),
        ("training reads", f"{_rate(wanted)}; the disk here: {_rate(here.read)}"),
    )
    for obstacle in _too_large(config, s, machine):
        yield f"warning: {obstacle}"
    yield from _ways(config, s, machine)


def _ways(config: PipelineConfig, s: Sizes, machine: Machine) -> list[str]:
    """Disk and hours of the three ways to feed an SAE, for one and for a sweep of five, on one such machine."""
    heldout, seen = s.geometry.holdout_shards * s.geometry.shard_rows, s.steps * config.train.batch_size
    again = "two windows; every epoch pays the forward passes again"
    unit = "GPU hours" if machine.is_gpu else "hours"
    rows: list[tuple[str, ...]] = [(f"{unit} of one such machine", "disk, one SAE", "one SAE", f"{SWEEP} SAEs", "")]
    for name, disk, tokens, each_pays, note in (
        ("full store", s.store, s.rows + heldout, False, "any further SAE trains from it"),
        ("stream", streamed_bytes(config, s), seen + heldout, False, again),
        ("regenerate in a buffer", 0, seen, True, "as SAELens does: every SAE pays the forward passes again"),
    ):
        cells = []
        for saes in (1, SWEEP):
            harvest = harvest_seconds(s, machine, tokens * (saes if each_pays else 1))
            training = train_seconds(config, s, machine, saes)
            cells.append(hours(None if harvest is None or training is None else harvest + training))
        rows.append((f"  {name}", size_text(disk + s.contexts + s.trained(1)), *cells, note))
    return table(rows)


def streamed_bytes(config: PipelineConfig, s: Sizes) -> int:
    """Bytes of activations that a stream has on the disk at once: held-out ones and two windows."""
    return s.holdout + min(2 * config.train.window_shards, s.geometry.train_shards) * s.shard


def harvest_seconds(s: Sizes, machine: Machine, tokens: int) -> float | None:
    """Seconds of the forward passes of so many tokens, or of writing them where that takes longer."""
    if machine.forward is None:
        return None
    return tokens * max(1 / machine.forward, s.shard / s.geometry.shard_rows / machine.write if machine.write else 0)


def train_seconds(config: PipelineConfig, s: Sizes, machine: Machine, saes: int) -> float | None:
    """Seconds of training so many SAEs of every hook from one reading, checkpoints included."""
    if machine.step is None:
        return None
    read = config.train.batch_size * 2 * s.geometry.d_in / machine.read if machine.read else 0.0
    stepping = s.steps * max(saes * machine.step, read)
    saved = config.train.runtime.checkpoints(s.steps, stepping) * saes * s.checkpoint
    return len(s.geometry.hooks) * (stepping + (saved / machine.write if machine.write else 0.0))


def _section(title: str, *rows: tuple[str, str]) -> list[str]:
    return ["", title, *table([(f"  {name}", text) for name, text in rows])]


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{size_text(value)}/s"


def _number(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"
