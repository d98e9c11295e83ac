"""`pipeline compare`: find evaluated runs by directory, fingerprint or settings file, and lay them side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate.claims import by_run
from evaluate.compare import FIGURES, KIND, SAE, Evaluated, columns, compare, short_name, titles, write_comparison
from evaluate.figures import text
from harvest.files import UserError
from harvest.stage_directory import FINGERPRINT, Run
from pipeline.config import load
from pipeline.metrics import read_evaluation
from pipeline.stages import find_runs, made_on
from pipeline.tables import table
from train.config import SaeConfig


def compare_runs(names: Sequence[str], overrides: list[str], root: Path, to: Path) -> list[str]:
    """Write compare.html and compare.json into `to`; returns the table's lines.

    A name is an evaluate directory, the fingerprint of one or of a train directory, or a settings file, to which
    the overrides apply. Raises UserError for what is none of them or not evaluated.
    """
    found = [run.path.resolve() for name in names for run in _runs(name, overrides, root)]
    evaluated = [_read(Run(path)) for path in dict.fromkeys(found)]
    rows = compare(evaluated)
    write_comparison(to, rows, by_run([run.figures for run in evaluated]))
    return _table(rows)


def _runs(name: str, overrides: list[str], root: Path) -> list[Run]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        found = [runs.of("evaluate") for runs in find_runs(load(path, overrides), root)]
        missing = [run.path for run in found if not run.is_complete]
        if missing:
            raise UserError(
                f"{name}: {len(missing)} of {len(found)} runs are not evaluated ({missing[0]}); run `make eval` "
                "with the same CONFIG and SET first"
            )
        return found
    if Run(path).is_complete:
        return [Run(path)]
    if FINGERPRINT.fullmatch(name):
        every = [run for run in map(Run, sorted((root / "evaluate").glob("*"))) if run.is_complete]
        named = [run for run in every if run.path.name == name]
        if found := named or [run for run in every if run.upstreams and run.upstreams[0].path.name == name]:
            return found
    raise UserError(
        f"{name!r}: neither a settings file, nor a complete evaluate directory, nor the fingerprint of an evaluated "
        f"run under {root}"
    )


def _read(run: Run) -> Evaluated:
    if (stage := run.manifest.get("stage")) != "evaluate":
        raise UserError(f"{run.path}: a {stage} directory; compare takes those of evaluate")
    evaluation = read_evaluation(run)
    saes = read_evaluation(newest[0]).saes if (newest := made_on(run, "explain")) else evaluation.saes
    settings = _flat(run.settings, "evaluate")
    for stage, fingerprint in evaluation.inputs.items():
        before = Run(run.path.parents[1] / stage / str(fingerprint))
        if before.is_complete:  # it may have been pruned
            settings |= _flat(before.settings, stage)
            if (
                stage == "train" and f"{SAE}.d_sae" in settings
            ):  # as older runs had it, and as fingerprints leave it out
                settings.setdefault(KIND, SaeConfig.model_fields["kind"].default)
    return Evaluated(run.path.name, evaluation._replace(saes=saes), settings)


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}").items()}
    return {prefix: value}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = columns(rows)
    cells = [["run", "hook", "kind", *map(short_name, names), *(titles()[name] for name in FIGURES)]]
    for row in rows:
        settings = [_short(row["settings"].get(name, "")) for name in names]
        figures = [text(row["figures"][name], name) for name in FIGURES]
        cells.append([_short(row["sae"] or row["run"]), _short(row["hook"]), row["kind"], *settings, *figures])
    return table(cells, right=range(2, len(cells[0])))


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
