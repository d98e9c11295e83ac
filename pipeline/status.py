"""What `status` says of each stage: complete, running, interrupted, or why it would run.

Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harvest.files import UserError, is_locked, read_json
from pipeline.fingerprint import STAGES, VERSIONS
from pipeline.inventory import changed_files, missing_files
from pipeline.manifest import BEGUN, STARTS_OVER, is_complete, read_manifest, said, way_out
from pipeline.stages import AnyRuns, swept


def status_lines(sweep: Sequence[AnyRuns]) -> list[str]:
    """One line a stage (and setting of a sweep): complete, running, interrupted, or why it would run."""
    lines: dict[str, int] = {}
    for runs in sweep:
        which = swept(runs, sweep)
        for line in _status_lines(runs):
            stage = STAGES.index(line.split()[0])
            lines[line if stage < STAGES.index("train") or not which else f"{line}  ({which})"] = stage
    return sorted(lines, key=lambda line: lines[line])


def _status_lines(runs: AnyRuns) -> list[str]:
    lines = []
    stale: str | None = None
    for stage in runs.stages:
        directory = runs.directory(stage)
        if is_complete(directory):
            state = _of_complete(directory, stage)
        elif is_locked(directory, stage):
            state = f"running    {_progress(directory)}{directory}"
        elif (directory / BEGUN).exists():
            again = "would start over" if stage == "evaluate" else f"would resume  {_progress(directory)}".rstrip()
            state = f"{again}  {directory}"
        else:
            state = f"would run: {why(runs, stage, stale)}"
        if not is_complete(directory):
            stale = stale or stage
        lines.append(f"{stage:9} {state}")
    return lines


def _of_complete(directory: Path, stage: str) -> str:
    """Whether what a complete stage left is there, by a look that takes milliseconds; evaluations are read."""
    try:
        changed = (changed_files if stage in STARTS_OVER else missing_files)(directory, read_manifest(directory))
        found = said(directory, changed) if changed else ""
    except UserError as error:
        found = str(error)
    if not found:
        return f"complete   {directory}"
    if stage in STARTS_OVER:
        return f"would start over: {found}"
    return f"damaged    {found}; restore it, or {way_out(stage)}"


def why(runs: AnyRuns, stage: str, stale: str | None) -> str:
    """Why a stage has no directory yet: what the nearest one, of the newest, on the same stage before has otherwise."""
    siblings = sorted((runs.root / stage).glob(f"*/{BEGUN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    upstream = runs.upstream(stage)
    nearest, was_run = None, False
    for path in siblings:
        try:
            other = read_json(path)
        except UserError:
            continue
        if ("ingest" in other.get("settings", {})) != ("ingest" in runs.settings(stage)):
            continue
        was_run = True
        if upstream and Path(str(other.get("upstream"))).name != runs.fingerprints[upstream]:
            continue
        changes = _differences(other.get("settings", {}), runs.settings(stage))
        if other.get("version") != VERSIONS[stage]:
            changes.insert(0, f"{stage} version: {other.get('version')} -> {VERSIONS[stage]}")
        if not changes:
            changes = _differences(other.get("inputs", {}), runs.inputs.known(stage))
        if changes and (nearest is None or len(changes) < len(nearest)):
            nearest = changes
    if nearest:
        return "; ".join(nearest)
    if stale:
        return f"{stale} would run before it"
    return f"its {upstream} is another one" if was_run and upstream else "it has not been run yet"


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return [
            line for i, pair in enumerate(zip(old, new, strict=True)) for line in _differences(*pair, f"{prefix}.{i}")
        ]
    return [] if old == new else [f"{prefix}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _progress(directory: Path) -> str:
    from harvest.progress import duration

    try:
        state = read_json(directory / "progress.json")
        return f"{state['done']:,}/{state['total']:,} {state['unit']}, {duration(state['seconds_left'])} left  "
    except (UserError, KeyError, TypeError, ValueError):
        return ""
