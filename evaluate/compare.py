"""Several evaluated runs side by side: what differs in their settings, their figures, the frontier as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluate.charts import points
from evaluate.report import figure
from harvest.files import replacing, write_json

# Name of a figure → its title, and where it stands in the figures of an SAE.
FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "l0": ("L0", ("fidelity", "outliers_excluded", "all", "l0")),
    "explained_variance": ("explained variance", ("fidelity", "outliers_excluded", "all", "explained_variance")),
    "explained_variance_legacy": ("legacy", ("fidelity", "outliers_excluded", "all", "explained_variance_legacy")),
    "mse": ("MSE", ("fidelity", "outliers_excluded", "all", "mse")),
    "cosine": ("cosine", ("fidelity", "outliers_excluded", "all", "cosine")),
    "dead_fraction": ("dead", ("features", "dead_fraction")),
    "ce_loss_score": ("ce_loss_score", ("downstream", "all", "ce_loss_score")),
    "kl_sae": ("KL", ("downstream", "all", "kl_sae")),
}
FRONTIER = ("explained_variance", "ce_loss_score")
SPARSITY = "train.sae.l1_coefficient"  # what moves an SAE along its frontier


class Evaluated(NamedTuple):
    """One evaluate directory: its fingerprint, metrics.json, and the settings of all stages by dotted name."""

    fingerprint: str
    metrics: dict[str, Any]
    settings: dict[str, Any]


def compare(runs: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """A row for each SAE of each run, sorted by hook and L0; a figure that a run does not have is None.

    `settings` of a row are those in which the runs differ.
    """
    names = sorted({name for run in runs for name in run.settings})
    differing = [n for n in names if len({repr(run.settings.get(n)) for run in runs}) > 1]
    rows = []
    for run in runs:
        mine = {name: run.settings.get(name) for name in differing}
        for hook, sae in run.metrics["saes"].items():
            rows.append({"run": run.fingerprint, "sae": "", "hook": hook, "settings": mine, "figures": _figures(sae)})
        for name, sae in run.metrics.get("also", {}).items():
            row = {"run": run.fingerprint, "sae": name, "hook": sae["hook"], "settings": {}, "figures": _figures(sae)}
            rows.append(row)
    unlike_any = float("inf")
    return sorted(rows, key=lambda r: (r["hook"], unlike_any if (l0 := r["figures"]["l0"]) is None else l0, r["run"]))


def write_comparison(folder: Path, runs: Sequence[Evaluated], rows: list[dict[str, Any]]) -> None:
    """Write compare.json and compare.html, which opens offline."""
    folder.mkdir(parents=True, exist_ok=True)
    definitions = {name: run_definition(runs, place) for name, (_, place) in FIGURES.items()}
    write_json(folder / "compare.json", {"schema": 1, "rows": rows, "definitions": definitions})
    environment = Environment(
        loader=PackageLoader("evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["figure"] = figure
    titles = {name: title for name, (title, _) in FIGURES.items()}
    charts = {titles[name]: _frontier(rows, name) for name in FRONTIER}
    differing = sorted({name for row in rows for name in row["settings"]})
    html = environment.get_template("compare.html").render(
        rows=rows, titles=titles, charts=charts, differing=differing, definitions=definitions
    )
    with replacing(folder / "compare.html") as partial:
        partial.write_text(html, encoding="utf-8")


def run_definition(runs: Sequence[Evaluated], place: tuple[str, ...]) -> str:
    """What a figure means, as the first run that has it says."""
    texts = (run.metrics.get("definitions", {}).get(place[0], {}).get(place[-1]) for run in runs)
    return next((text for text in texts if text), "")


def _figures(sae: dict[str, Any]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name, (_, place) in FIGURES.items():
        value: Any = sae
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        out[name] = value
    return out


def short_name(setting: str) -> str:
    """A setting's name as tables and charts write it."""
    return setting.removeprefix("train.").removeprefix("sae.")


def frontier_lines(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[tuple[float, float]]]:
    """(L0, figure) by line: ours of one hook that differ in one setting alone; an SAE of others is a line of its own.

    The setting is l1_coefficient where it differs, else the one of most values.
    """
    own = [row for row in rows if not row["sae"]]
    values: dict[str, set[str]] = {}
    for row in own:
        for setting, value in row["settings"].items():
            values.setdefault(setting, set()).add(repr(value))
    walked = max(values, key=lambda setting: (setting == SPARSITY, len(values[setting])), default="")
    several_hooks = len({row["hook"] for row in own}) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at = row["figures"]["l0"], row["figures"][name]
        fixed = [f"{short_name(n)} {v}" for n, v in sorted(row["settings"].items()) if n != walked]
        hook = [row["hook"]] if several_hooks or not fixed else []
        if None not in at:
            series.setdefault(row["sae"] or ", ".join(hook + fixed), []).append(at)
    return series


def _frontier(rows: list[dict[str, Any]], name: str) -> Any:
    return points(f"{FIGURES[name][0]} by L0", frontier_lines(rows, name), "L0")
