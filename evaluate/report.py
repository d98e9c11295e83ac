"""report.html: one file that opens offline; what comes from data is escaped."""

import json
from math import log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluate.charts import bars, cells, lines
from evaluate.diff import CELLS, FLOOR
from evaluate.visible import visible
from harvest.files import replacing
from harvest.progress import duration

# arXiv 2503.18878 for DeepSeek-R1-Distill-Llama-8B, layer 19; its 68.5% is the legacy formula, as
# SAELens 5.5.2 logged it.
PAPER = {"l0": 86.0, "explained_variance_legacy": 0.685}

FIDELITY_COLUMNS = {
    "rows": "rows",
    "l0": "L0",
    "explained_variance": "explained variance",
    "explained_variance_legacy": "legacy",
    "mse": "MSE",
    "cosine": "cosine",
    "norm_ratio": "norm ratio",
}
TEXT_COLUMNS = {  # of a source in the sample's summary
    "rows": "rows",
    "train_documents": "used: training",
    "holdout_documents": "used: held out",
    "rows_dropped": "dropped",
    "rows_filtered": "filtered out",
    "rows_not_needed": "not needed",
    "rows_not_reached": "not reached",
}
DOWNSTREAM_ROWS = {
    "contexts": "contexts",
    "ce_clean": "activations as they are",
    "ce_sae": "rebuilt by the SAE",
    "ce_mean_ablated": "mean-ablated",
    "ce_zero_ablated": "zero-ablated",
    "ce_loss_score": "ce_loss_score",
    "kl_sae": "KL(clean ‖ SAE)",
    "ce_sae_all_rows": "rebuilt by the SAE, all rows",
    "ce_zero_ablated_all_rows": "zero-ablated, all rows",
    "ce_loss_score_all_rows": "ce_loss_score, all rows",
    "kl_sae_all_rows": "KL(clean ‖ SAE), all rows",
}


def write_report(
    path: Path, metrics: dict[str, Any], curves: dict[str, Path], manifests: dict[str, dict[str, Any]]
) -> None:
    """Write the report of all SAEs of a run. `curves` are their metrics.jsonl by hook."""
    environment = Environment(
        loader=PackageLoader("evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figure": figure, "duration": duration, "visible": visible}
    html = environment.get_template("report.html").render(
        run=path.parent.name,
        metrics=metrics,
        paper=PAPER,
        fidelity_columns=FIDELITY_COLUMNS,
        downstream_rows=DOWNSTREAM_ROWS,
        charts={hook: _charts(metrics["saes"][hook], _lines(file)) for hook, file in curves.items()},
        diff_charts={hook: _diff_charts(sae.get("diff", {})) for hook, sae in metrics["saes"].items()},
        manifests=manifests,
        text=_text(manifests.get("sample")),
        waits=_waits(manifests),
        settings={name: _flat(manifest["settings"]) for name, manifest in manifests.items()},
        numerics={name: _flat(manifest["numerics"]) for name, manifest in manifests.items()},
    )
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")


def figure(value: Any, name: str = "") -> str:
    """A figure of a table, by its name."""
    if value is None:
        return "–"
    if name in ("rows", "contexts"):
        return f"{value:,}"
    if name in ("explained_variance", "explained_variance_legacy", "cosine", "norm_ratio") or "score" in name:
        return f"{value:.3f}"
    if name in ("l0", "mse"):
        return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.3f}"


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


def _waits(manifests: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds that each side of a stream waited for the other, by stage; empty where none did."""
    waits = {"harvest": manifests["harvest"]["summary"].get("waited_for_training_seconds")}
    hooks = [figures for figures in manifests["train"]["summary"].values() if isinstance(figures, dict)]
    waits["train"] = next((hook.get("waited_for_harvest_seconds") for hook in hooks), None)
    return {stage: seconds for stage, seconds in waits.items() if seconds is not None}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _charts(figures: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    train = [line for line in log if line["kind"] == "train"]
    validation = [line for line in log if line["kind"] == "validation"]

    def series(name: str) -> dict[str, list[tuple[float, float]]]:
        out = {"training": [(line["step"], line[name]) for line in train]}
        return out | {"held-out": [(line["step"], line[name]) for line in validation if name in line]}

    histogram = figures["features"]["log10_density_histogram"]
    charts = {
        "Explained variance": lines("Explained variance by step", series("explained_variance")),
        "L0": lines("L0 by step", series("l0")),
        "Loss (λ warms up)": lines("Loss by step", series("loss")),
        "Feature density": bars(
            "Features by density",
            histogram["counts"],
            histogram["edges"],
            "log10 of the part of rows it fires in",
        ),
    }
    if "curve" in figures.get("reason_score", {}):
        curve = [(log10(rank), score) for rank, score in figures["reason_score"]["curve"]]
        charts["ReasonScore"] = lines("Features by ReasonScore", {"score": curve}, "log10 of the rank", clip=False)
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
