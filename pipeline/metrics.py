"""The figures of a complete evaluation, for the model card, `compare` and `push`."""

from collections.abc import Sequence
from typing import Any

from harvest.files import UserError, read_json
from harvest.stage_directory import Run

FILE = "metrics.json"


def read_metrics(run: Run) -> dict[str, Any]:
    """metrics.json of a complete evaluation.

    Raises UserError when it is damaged, or belongs to another run.
    """
    manifest = run.manifest
    if run.changed(only=FILE):
        raise UserError(f"{run.said([FILE])}; restore it, or {run.way_out}")
    metrics = read_json(run.path / FILE)
    found, trained = metrics.get("fingerprint"), metrics.get("inputs", {}).get("train")
    if found not in (None, manifest["fingerprint"]) or trained != run.upstreams[0].path.name:
        raise UserError(
            f"{run.path / FILE}: holds the figures of another run ({found or trained}), not of "
            f"{manifest['fingerprint']}; restore it, or {run.way_out}"
        )
    return metrics


def value(metrics: dict[str, Any], hook: str, place: Sequence[str]) -> float | None:
    """A figure of the run's own SAE at a hook, without outliers and of all sources; None where it was not measured."""
    found: Any = metrics.get("saes", {}).get(hook)
    for name in place:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def definition(metrics: dict[str, Any], place: Sequence[str]) -> str:
    """What a figure means."""
    return metrics.get("definitions", {}).get(place[0], {}).get(place[-1], "")
