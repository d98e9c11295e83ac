"""Several evaluated runs side by side: what differs in their settings, their figures, the frontier as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluate.charts import points
from evaluate.claims import Claim
from evaluate.figures import Evaluation, definitions, text
from evaluate.report import environment, interval, write_text
from evaluate.visible import visible
from harvest.files import write_json
from train.config import HYPERPARAMETERS, SPARSITY_SETTINGS, said_of

OF_KINDS = frozenset(f"train.sae.{name}" for name in HYPERPARAMETERS)
FIGURES = ("l0", "explained_variance", "explained_variance_legacy", "mse", "cosine", "dead_fraction")
FIGURES += ("ce_loss_score", "kl_sae")
FRONTIER = ("explained_variance", "ce_loss_score")
SAE = "train.sae"
KIND = f"{SAE}.kind"
SPARSITY = tuple(f"{SAE}.{name}" for name in SPARSITY_SETTINGS)  # what moves an SAE along its frontier


class Evaluated(NamedTuple):
    """One evaluate directory: its fingerprint, its figures, and the settings of all stages by dotted name."""

    fingerprint: str
    figures: Evaluation
    settings: dict[str, Any]


def compare(runs: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """A row for each SAE of each run, sorted by hook and L0; a figure that a run does not have is None.

    `settings` of a row are those in which the runs differ; `kind` says the kind of SAE and what sets its sparsity.
    """
    differing = _differing(runs)
    rows = [
        {
            "run": run.fingerprint,
            "sae": sae.name or sae.about.get("label", ""),
            "hook": sae.hook,
            "kind": "" if sae.name else _kind(run.settings),
            "settings": {}
            if sae.name
            else {n: run.settings.get(n) for n in differing if not sae.about or not _of_sae(n)},
            "figures": {name: sae.value(name) for name in FIGURES},
        }
        for run in runs
        for sae in run.figures.saes
    ]
    unlike_any = float("inf")
    return sorted(rows, key=lambda r: (r["hook"], unlike_any if (l0 := r["figures"]["l0"]) is None else l0, r["run"]))


def _kind(settings: dict[str, Any]) -> str:
    """What a table says of an SAE of ours; empty where its training is not known."""
    of_sae = {name.removeprefix(f"{SAE}."): value for name, value in settings.items()}
    return said_of(of_sae) if KIND in settings else ""


def _differing(runs: Sequence[Evaluated]) -> list[str]:
    """Settings in which runs differ; those of training in which runs of SAEs of our own do."""
    found = []
    trained = [run for run in runs if not run.figures.saes[0].about]
    for name in sorted({name for run in runs for name in run.settings}):
        among = trained if _of_sae(name) else runs
        # A setting of some kinds differs where SAEs of one kind differ in it.
        kinds = {run.settings.get(KIND) for run in among} if name in OF_KINDS else {None}
        for kind in kinds:
            of_kind = [run for run in among if name not in OF_KINDS or run.settings.get(KIND) == kind]
            if len({repr(run.settings.get(name)) for run in of_kind}) > 1 and name not in found:
                found.append(name)
    return found


def _of_sae(name: str) -> bool:
    """Whether a setting says how an SAE came about, or which rows were made for it."""
    return name.startswith("train.") or name == "harvest.splits"


def titles() -> dict[str, str]:
    """Titles of the figures of a comparison by name."""
    return {name: about["title"] for of in definitions().values() for name, about in of.items() if name in FIGURES}


def write_comparison(folder: Path, rows: list[dict[str, Any]], known: list[tuple[str, list[Claim]]]) -> None:
    """Write compare.json and compare.html, which opens offline. `known` is what `claims.by_run` gives."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: about["text"] for of in definitions().values() for name, about in of.items() if name in FIGURES}
    of_runs = [{"run": name, "features": [claim._asdict() for claim in found]} for name, found in known]
    write_json(folder / "compare.json", {"schema": 1, "rows": rows, "claims": of_runs, "definitions": texts})
    charts = {titles()[name]: points(f"{titles()[name]} by L0", frontier_lines(rows, name), "L0") for name in FRONTIER}
    html = (
        environment({"text": text, "interval": interval, "visible": visible})
        .get_template("compare.html")
        .render(
            rows=rows,
            titles=titles(),
            charts=charts,
            differing=columns(rows),
            definitions=texts,
            known=known,
            ranks=max((len(found) for _, found in known), default=0),
        )
    )
    write_text(folder / "compare.html", html)


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that a table has a column for: those that differ and that `kind` does not say."""
    named = {name for row in rows for name in row["settings"]}
    return sorted(named - {KIND, *SPARSITY} if any(row["kind"] for row in rows) else named)


def short_name(setting: str) -> str:
    """A setting's name as tables and charts write it."""
    return setting.removeprefix("train.").removeprefix("sae.")


def frontier_lines(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[tuple[float, float]]]:
    """(L0, figure) by line: ours of one kind and hook that differ in what sets their sparsity alone.

    Where nothing of that differs, a line joins those that differ in the setting of most values. An SAE of others is a
    line of its own.
    """
    own = [row for row in rows if not row["sae"]]
    values: dict[str, set[str]] = {}
    for row in own:
        for setting, value in row["settings"].items():
            values.setdefault(setting, set()).add(repr(value))
    walked = values.keys() & set(SPARSITY)
    if not walked and (others := values.keys() - {KIND}):
        walked = {max(sorted(others), key=lambda setting: len(values[setting]))}
    several_hooks = len({row["hook"] for row in own}) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at, settings = (row["figures"]["l0"], row["figures"][name]), row["settings"]
        kind = [str(settings[KIND])] if settings.get(KIND) else []
        rest = {n: v for n, v in sorted(settings.items()) if n != KIND and n not in walked and not _is_absent(n, v)}
        fixed = kind + [f"{short_name(n)} {v}" for n, v in rest.items()]
        hook = [row["hook"]] if several_hooks or not fixed else []
        if None not in at:
            series.setdefault(row["sae"] or ", ".join(hook + fixed), []).append(at)
    return series


def _is_absent(name: str, value: Any) -> bool:
    """Whether a setting is one that an SAE's kind does not have."""
    return name in OF_KINDS and value is None
