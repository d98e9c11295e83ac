"""The four stages: where each writes, whether it is complete, why it would run, and running it.

Nothing here imports torch until a stage really runs.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harvest.files import UserError, is_locked, locked, read_json
from pipeline.config import PipelineConfig
from pipeline.fingerprint import (
    STAGES,
    VERSIONS,
    Inputs,
    find_inputs,
    fingerprints,
    hashed_settings,
    resolved_commit,
)
from pipeline.manifest import BEGUN, MANIFEST, begin, finish, is_complete


class Runs(NamedTuple):
    """One setting of the pipeline, and where its results stand under the root folder."""

    config: PipelineConfig
    inputs: Inputs
    fingerprints: dict[str, str]
    root: Path

    def directory(self, stage: str) -> Path:
        return self.root / stage / self.fingerprints[stage]

    def upstream(self, stage: str) -> str | None:
        index = STAGES.index(stage)
        return STAGES[index - 1] if index else None

    def identity(self, stage: str) -> dict[str, Any]:
        """What begun.json and the manifest say of a directory, but for times and numerics."""
        upstream = self.upstream(stage)
        return {
            "stage": stage,
            "version": VERSIONS[stage],
            "fingerprint": self.fingerprints[stage],
            "upstream": str(self.directory(upstream)) if upstream else None,
            "settings": self.settings(stage),
            "inputs": self.inputs._asdict(),
        }

    def settings(self, stage: str) -> dict[str, Any]:
        settings = hashed_settings(getattr(self.config, stage))
        if stage in ("sample", "harvest"):
            settings["model"] = self.config.model.model_dump()
        return settings


def find_runs(config: PipelineConfig, root: Path) -> Runs:
    """Identify inputs and fingerprints; see `find_inputs` for what it raises."""
    inputs = find_inputs(config, root)
    return Runs(config, inputs, fingerprints(config, inputs), root)


def run_stage(runs: Runs, stage: str, *, allow_mixed: bool, force: bool, confirm: Callable[[str], bool]) -> None:
    """Run a stage unless it is complete; resume it where it was left.

    Raises UserError when the stage before is not complete, another process runs this one, or the
    numerics have changed.
    """
    directory, upstream = runs.directory(stage), runs.upstream(stage)
    if is_complete(directory) and not force:
        print(f"{stage:9} complete  {directory}", flush=True)
        return
    if upstream and not is_complete(runs.directory(upstream)):
        command = "harvest" if upstream == "sample" else upstream
        raise UserError(
            f"{stage}: the {upstream} stage for these settings is not complete ({runs.directory(upstream)}); "
            f"run `make {command}` with the same CONFIG and SET first"
        )
    with locked(directory, stage):
        if force and (directory / BEGUN).exists():
            _clear(directory, confirm)
        print(f"{stage:9} {'resumes' if (directory / BEGUN).exists() else 'runs'}  {directory}", flush=True)
        run = _stage_function(runs, stage)

        def on_begin(numerics: dict[str, Any]) -> None:
            begin(directory, runs.identity(stage), numerics, allow_mixed)

        summary = run(on_begin)
        finish(directory, summary)
    print(summary_table(stage, summary), flush=True)
    print(f"{stage:9} complete  {directory}", flush=True)


def _stage_function(runs: Runs, stage: str) -> Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]]:
    config, inputs, here = runs.config, runs.inputs, runs.directory
    if stage == "sample":
        from harvest import sampling

        commits = [resolved_commit(identity) for identity in inputs.sources]
        model_commit = resolved_commit(inputs.tokenizer)
        return lambda begin: sampling.run(config.model, model_commit, config.sample, commits, here("sample"), begin)
    model_commit = resolved_commit(inputs.model)
    if stage == "harvest":
        from harvest import run as harvest

        return lambda begin: harvest.run(
            config.model, model_commit, config.sample, config.harvest, here("sample"), here("harvest"), begin
        )
    if stage == "train":
        from train import run as train

        return lambda begin: train.run(config.train, here("harvest"), here("train"), begin)
    from evaluate import run as evaluate

    manifests = {name: read_json(here(name) / MANIFEST) for name in STAGES[:3]}
    upstream = evaluate.Upstream(here("sample"), here("harvest"), here("train"), manifests)
    return lambda begin: evaluate.run(config.model, model_commit, config.evaluate, upstream, here("evaluate"), begin)


def _clear(directory: Path, confirm: Callable[[str], bool]) -> None:
    """Empty a run directory for --force, after asking where it is complete."""
    if is_complete(directory) and not confirm(f"{directory} is complete. Delete it and run anew?"):
        raise UserError(f"{directory}: left as it was")
    for name in (MANIFEST, BEGUN):  # first: what is half deleted must not pass for complete
        (directory / name).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith(".lock-"):
            path.unlink()


def status_lines(runs: Runs) -> list[str]:
    """One line a stage: complete, running (with progress), interrupted, or why it would run."""
    lines = []
    stale: str | None = None
    for stage in STAGES:
        directory = runs.directory(stage)
        if is_complete(directory):
            state = f"complete   {directory}"
        elif is_locked(directory, stage):
            state = f"running    {_progress(directory)}{directory}"
        elif (directory / BEGUN).exists():
            state = f"would resume  {_progress(directory)}{directory}"
        else:
            state = f"would run: {why(runs, stage, stale)}"
        if not is_complete(directory):
            stale = stale or stage
        lines.append(f"{stage:9} {state}")
    return lines


def why(runs: Runs, stage: str, stale: str | None) -> str:
    """Why a stage has no directory yet, by comparison with the newest one of the same stage."""
    siblings = sorted((runs.root / stage).glob(f"*/{BEGUN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in siblings:
        try:
            other = read_json(path)
        except UserError:
            continue
        if other.get("version") != VERSIONS[stage]:
            return f"{stage} version: {other.get('version')} -> {VERSIONS[stage]}"
        changes = _differences(other.get("settings", {}), runs.settings(stage))
        if stage in ("sample", "harvest") and not changes:
            changes = _differences(other.get("inputs", {}), runs.inputs._asdict())
        if changes:
            return "; ".join(changes)
        break
    if stale:
        return f"{stale} would run before it"
    upstream = runs.upstream(stage)
    return f"its {upstream} is another one" if siblings else "it has not been run yet"


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


def summary_table(stage: str, summary: dict[str, Any]) -> str:
    """The figures of a stage as aligned lines."""
    flat = {f"{stage}": ""}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= {f"  {key}  {k}": v for k, v in value.items() if not isinstance(v, dict | list)}
        elif not isinstance(value, list):
            flat[f"  {key}"] = value
    width = max(len(key) for key in flat)
    return "\n".join(f"{key:{width}}  {_figure(value)}".rstrip() for key, value in flat.items())


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
