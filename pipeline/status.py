"""What `status` says of each stage: complete, running, interrupted, or why it would run.

Nothing here imports torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from harvest.files import UserError, read_json
from harvest.progress import duration
from harvest.stage_directory import BEGUN, MADE_ANEW, STARTS_OVER, Run, upstreams
from pipeline.fingerprint import EVERY_STAGE
from pipeline.running import damage
from pipeline.stages import Runs, made_later, swept


def status_lines(sweep: Sequence[Runs]) -> list[str]:
    """One line a stage (and setting of a sweep): complete, running, interrupted, or why it would run."""
    order = EVERY_STAGE
    lines: dict[str, int] = {}
    for runs in sweep:
        which = swept(runs, sweep)
        for stage, state in _states(runs):
            apart = f"  ({which})" if which and stage in ("train", *MADE_ANEW) else ""
            lines[f"{stage:9} {state}{apart}"] = order.index(stage)
    return sorted(lines, key=lambda line: lines[line])


def _states(runs: Runs) -> Iterator[tuple[str, str]]:
    stale: str | None = None
    for stage in runs.stages:
        run = runs.of(stage)
        if run.is_complete:
            yield stage, _of_complete(run)
            continue
        if run.is_running:
            yield stage, f"running    {_progress(run)}{run.path}"
        elif run.is_begun:
            again = "would start over" if stage in STARTS_OVER else f"would resume  {_progress(run)}".rstrip()
            yield stage, f"{again}  {run.path}"
        else:
            yield stage, f"would run: {_why(runs, stage, stale)}"
        stale = stale or stage
    for run in made_later(runs.of("evaluate")):
        if run.stage not in runs.stages:
            yield run.stage, _of_complete(run)


def _of_complete(run: Run) -> str:
    try:
        found = damage(run)
    except UserError as error:
        found = str(error)
    if not found:
        return f"complete   {run.path}"
    if run.stage in MADE_ANEW:
        return f"would start over: {found}"
    return f"damaged    {found}; restore it, or {run.way_out}"


def _why(runs: Runs, stage: str, stale: str | None) -> str:
    """Why a stage has no directory yet: how the nearest (newest) one on the same upstreams differs."""
    siblings = sorted((runs.root / stage).glob(f"*/{BEGUN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    mine, settings = [run.path for run in runs.upstreams(stage)], runs.settings(stage)
    inputs = runs.inputs.known(stage)
    nearest: list[str] = []
    was_run = False
    for path in siblings:
        try:
            other = read_json(path)
        except UserError:
            continue
        if ("ingest" in other.get("settings", {})) != ("ingest" in settings):
            continue
        if ("published" in other.get("inputs", {})) != ("published" in inputs):
            continue
        was_run = True
        if [run.path for run in upstreams(other, runs.root)] != mine:
            continue
        changes = _differences(other.get("settings", {}), settings)
        if other.get("version") != runs.stages[stage].version:
            changes.insert(0, f"{stage} version: {other.get('version')} -> {runs.stages[stage].version}")
        changes = changes or _differences(other.get("inputs", {}), inputs)
        if changes and (not nearest or len(changes) < len(nearest)):
            nearest = changes
    if nearest:
        return "; ".join(nearest)
    if stale:
        return f"{stale} would run before it"
    before = ", ".join(runs.stages[stage].upstreams)
    return f"its {before} is another one" if was_run and before else "it has not been run yet"


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        pairs = list(zip(range(len(old)), old, new, strict=True))
    else:
        return [] if old == new else [f"{prefix}: {_short(old)} -> {_short(new)}"]
    start = f"{prefix}." if prefix else ""
    return [line for key, before, after in pairs for line in _differences(before, after, f"{start}{key}")]


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _progress(run: Run) -> str:
    try:
        state = read_json(run.path / "progress.json")
        return f"{state['done']:,}/{state['total']:,} {state['unit']}, {duration(state['seconds_left'])} left  "
    except (UserError, KeyError, TypeError, ValueError):
        return ""
