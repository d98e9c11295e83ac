"""report.html: one file that opens offline; what comes from data is escaped."""

import json
from math import log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evaluate.benchmark_figures import findings
from evaluate.benchmark_views import FILTERS as BENCHMARK_FILTERS
from evaluate.charts import bars, cells, lines
from evaluate.claims import any_known, claims
from evaluate.diff import CELLS, FLOOR
from evaluate.feature_views import rounded, thousandths
from evaluate.figures import Evaluation, Figure, Measured, text
from evaluate.visible import visible
from harvest.files import replacing
from harvest.progress import duration
from train.config import said_of

# arXiv 2503.18878 for DeepSeek-R1-Distill-Llama-8B, layer 19; its 68.5% is the legacy formula, as
# SAELens 5.5.2 logged it.
PAPER = {"l0": 86.0, "explained_variance_legacy": 0.685}

TEXT_COLUMNS = {  # of a source in the sample's summary
    "rows": "rows",
    "train_documents": "used: training",
    "holdout_documents": "used: held out",
    "rows_dropped": "dropped",
    "rows_filtered": "filtered out",
    "rows_not_needed": "not needed",
    "rows_not_reached": "not reached",
}


def write_report(
    path: Path, evaluation: Evaluation, curves: dict[str, Path], manifests: dict[str, dict[str, Any]]
) -> None:
    """Write the report of all SAEs of a run. `curves` are their metrics.jsonl by hook, of those that were trained."""
    own = [sae for sae in evaluation.saes if not sae.name]
    filters = {"text": text, "shown": shown, "duration": duration, "visible": visible, "interval": interval}
    filters |= {"rounded": rounded, "thousandths": thousandths, **BENCHMARK_FILTERS}
    known = {sae.hook: claims(sae) for sae in own}
    template = environment(filters, benchmark_findings=findings).get_template("report.html")
    html = template.render(
        evaluation=evaluation,
        own=own,
        also=[sae for sae in evaluation.saes if sae.name],
        paper=PAPER,
        charts={sae.hook: _charts(sae, _lines(curves[sae.hook]) if sae.hook in curves else []) for sae in own},
        diff_charts={sae.hook: _diff_charts(sae.lists.get("diff", {})) for sae in own},
        claims={hook: found for hook, found in known.items() if any_known(found)},
        manifests=manifests,
        kind=said_of(sae) if (sae := manifests["train"]["settings"].get("sae")) else "",
        text_rows=_text(manifests.get("sample")),
        settings={name: _flat(manifest["settings"]) for name, manifest in manifests.items()},
        numerics={name: _flat(manifest["numerics"]) for name, manifest in manifests.items()},
    )
    write_text(path, html)


def environment(filters: dict[str, Any], **variables: Any) -> Environment:
    """Templates of this package: all that they insert is escaped, and an unknown name is an error."""
    out = Environment(loader=PackageLoader("evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    out.filters |= filters
    out.globals |= variables
    return out


def write_text(path: Path, html: str) -> None:
    """Write a page whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")


def shown(figure: Figure | None) -> str:
    """A figure as a cell of a table; a dash where it was not measured."""
    return text(figure.value, figure.name) if figure else text(None)


def interval(value: dict[str, float], form: str) -> Markup:
    """A figure with its interval beneath, as cells of a table have it; `form` is that of one number."""
    low, high = form % value["low"], form % value["high"]
    return Markup("{}<small>{} to {}</small>").format(form % value["value"], low, high)


def _text(sample: dict[str, Any] | None) -> dict[str, Any] | None:
    """What became of the rows of each source, by the manifest of the sample; None without text.

    Samples of earlier versions did not count them all.
    """
    if sample is None:
        return None
    settings, summary = sample["settings"], sample["summary"]
    sources = {source["name"]: summary[source["name"]] for source in settings["sources"]}
    counted = {name: counts for name, counts in sources.items() if "rows" in counts}
    has_chats = any(source["rows"] not in ("text", "tokens") for source in settings["sources"])
    return {
        "template": (settings["template"] or "model") if has_chats else "none",
        "bos": summary.get("bos", "none"),
        "columns": TEXT_COLUMNS,
        "sources": counted,
        "reasons": [
            (name, what, reason, kept)
            for name, counts in counted.items()
            for what in ("dropped", "cut")
            for reason, kept in sorted(counts[what].items(), key=lambda item: -item[1]["rows"])
        ],
        "malformed": {name: counts["rows_malformed"] for name, counts in counted.items() if counts["rows_malformed"]},
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _charts(sae: Measured, log: list[dict[str, Any]]) -> dict[str, Any]:
    def series(name: str) -> dict[str, list[tuple[float, float]]]:
        kinds = {"training": "train", "held-out": "validation"}
        return {
            title: [(line["step"], line[name]) for line in log if line["kind"] == kind and name in line]
            for title, kind in kinds.items()
        }

    histogram = sae.lists["features"]["log10_density_histogram"]
    of_training = {
        "Explained variance": lines("Explained variance by step", series("explained_variance")),
        "L0": lines("L0 by step", series("l0")),
        "Loss (its coefficients warm up)": lines("Loss by step", series("loss")),
    }
    charts = of_training if log else {}
    charts["Feature density"] = bars(
        "Features by density", histogram["counts"], histogram["edges"], "log10 of the part of rows it fires in"
    )
    train = [line for line in log if line["kind"] == "train"]
    names = {name.removesuffix("_coefficient") for line in train for name in line if name.endswith("_coefficient")}
    terms = {n: [(line["step"], line[n]) for line in train if n in line] for n in (*sorted(names), "inner")}
    if shown := {name: values for name, values in terms.items() if values}:
        charts["Terms of the loss beside the squared error"] = lines("Terms of the loss by step", shown)
    if curve := sae.lists.get("reason_score", {}).get("curve"):
        points = [(log10(rank), score) for rank, score in curve]
        charts["ReasonScore"] = lines("Features by ReasonScore", {"score": points}, "log10 of the rank", clip=False)
    return charts


def _diff_charts(diff: dict[str, Any]) -> dict[str, Any]:
    titles = {kind: f"Firing rates: {found['a']} against {found['b']}" for kind, found in diff.items()}
    return {
        kind: cells(titles[kind], found["cells"], CELLS, FLOOR, (f"rate, {found['a']}", f"rate, {found['b']}"))
        for kind, found in diff.items()
    }


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}.{i}").items()}
    return {prefix: str(value)}
