"""The evaluate stage: every SAE of a training run on held-out text, into metrics.json and report.html."""

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from evaluate import diff, downstream, feature_pages, fidelity, intervals, reason_score, steering
from evaluate.config import EvaluateConfig
from evaluate.fidelity import Fidelity
from evaluate.groups import context_groups
from evaluate.published import load_published
from evaluate.report import write_report
from evaluate.subject import NoText, Subject
from evaluate.unembedding import load_unembedding
from harvest.activation_store import ActivationStore, slug
from harvest.config import ModelConfig
from harvest.contexts import Contexts
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, write_sealed
from harvest.language_model import load_model
from harvest.store_files import files_of
from harvest.tokenizer import load_tokenizer, load_whole_tokenizer
from train.checkpoint import SavedSae, load_sae
from train.config import ExcludeConfig

# In this order, each gives its section of metrics.json, or None where its setting is null.
ANALYSES: dict[str, Callable[[Subject, Fidelity], dict[str, Any] | None]] = {
    "fidelity": lambda _subject, heldout: heldout.figures,
    "features": fidelity.features,
    "statistics": lambda subject, _heldout: subject.saved.statistics._asdict(),
    "downstream": downstream.analyse,
    "reason_score": reason_score.analyse,
    "feature_pages": feature_pages.analyse,
    "steering": steering.analyse,
    "diff": diff.analyse,
}
OF_ROWS = ("fidelity", "features", "statistics")  # those that need neither model nor text
OF_OTHERS = (*OF_ROWS, "downstream")  # of the SAEs in evaluate.also
DEFINITIONS = {
    "statistics": {
        "scale": "input scale s = sqrt(d_in) / mean norm of the kept rows of the first window of training "
        "[1 / unit of the stored activations]",
        "median_norm": "median norm of all rows of that window [unit of the stored activations]",
        "norm_limit": "training leaves out rows of a larger norm; null: none [unit of the stored activations]",
    },
    "fidelity": fidelity.DEFINITIONS,
    "features": fidelity.DENSITY_DEFINITIONS,
    "downstream": downstream.DEFINITIONS,
    "reason_score": reason_score.DEFINITIONS,
    "feature_pages": feature_pages.DEFINITIONS,
    "steering": steering.DEFINITIONS,
    "diff": diff.DEFINITIONS,
}


class Upstream(NamedTuple):
    """Directories of the stages before, and their manifests by name."""

    sample: Path | None  # None where the store was ingested: there is no text then
    harvest: Path
    train: Path
    manifests: dict[str, dict[str, Any]]


def run(
    model_config: ModelConfig | None,
    model_commit: str | None,
    config: EvaluateConfig,
    also_commits: Sequence[str | None],
    upstream: Upstream,
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `directory/metrics.json` and `report.html` and return the main figures.

    Without a model and its text, only the analyses `OF_ROWS` are made. `also_commits` are the hub commits of
    `config.also`, None for local ones.

    Raises UserError for an SAE that does not fit the store or the model, and for held-out text that is
    damaged or missing.
    """
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.downstream.compute_dtype if config.downstream else "auto", device)
    threads = set_threads(config.runtime.threads, device)
    begin(numerics(device, dtype, threads=threads if device.type == "cpu" else None))
    store = ActivationStore.open(files_of(upstream.harvest))
    store.check_complete(("holdout",))
    contexts = Contexts(upstream.sample / "contexts") if upstream.sample else NoText()
    text = contexts.read("holdout", "source", 0, contexts.count("holdout")), context_groups(contexts, "holdout")
    left_out = [name for name in ANALYSES if name not in OF_ROWS] if model_config is None else []
    if left_out:
        print(f"evaluate: left out, as ingested rows have no model and no text: {', '.join(left_out)}", flush=True)
    exclude = ExcludeConfig(**upstream.manifests["train"]["settings"]["exclude"])
    given: Any = model_config  # None only where the analyses that load something of it are left out
    hooks, offline = store.geometry.hooks, config.runtime.offline
    once = (
        cache(partial(load_model, given, model_commit, hooks, dtype, device, offline=offline, with_head=True)),
        cache(partial(load_tokenizer, given, model_commit, offline)),
        cache(partial(load_unembedding, given, model_commit, offline)),
        cache(partial(load_whole_tokenizer, given, model_commit, offline)),
    )

    def analysed(saved: SavedSae, analyses: Collection[str], name: str | None = None) -> dict[str, Any]:
        saved = saved._replace(sae=saved.sae.to(device))
        subject = Subject(saved, store, exclude, contexts, *text, *once, config, device, directory, name)
        heldout = fidelity.measure(subject)
        sections = {name: ANALYSES[name](subject, heldout) for name in analyses if name not in left_out}
        return {name: section for name, section in sections.items() if section is not None}

    own = {hook: _load(upstream.train / slug(hook), hook, config, store) for hook in store.geometry.hooks}
    statistics = {hook: saved.statistics for hook, saved in own.items()}
    others = [  # all of them before the first is measured, so that what does not fit is said at once
        (published.name, load_published(published, commit, store, statistics, config.runtime.offline))
        for published, commit in zip(config.also, also_commits, strict=True)
    ]
    saes = {hook: analysed(saved, ANALYSES) for hook, saved in own.items()}
    also = {
        name: {"hook": saved.hook, "about": saved.about, **analysed(saved, OF_OTHERS, name)} for name, saved in others
    }
    definitions = {
        **DEFINITIONS,
        "interval": intervals.DEFINITION,
        "group": "all held-out contexts, those of a source, or, as source/value, those of one of its strata",
        "outliers_excluded": "rows that training leaves out (train.exclude) are not counted",
        "all_rows": "every held-out row is counted",
    }
    inputs = {name: manifest["fingerprint"] for name, manifest in upstream.manifests.items()}
    metrics = {
        "schema": 1,
        "fingerprint": directory.name,
        "inputs": inputs,
        "which_sae": config.sae,
        "left_out": left_out,
        "saes": saes,
        "definitions": definitions,
    }
    metrics |= {"also": also} if also else {}
    write_sealed(directory / "metrics.json", metrics)
    curves = {hook: upstream.train / slug(hook) / "metrics.jsonl" for hook in saes}
    write_report(directory / "report.html", metrics, curves, upstream.manifests)
    return {name: _main_figures(figures) for name, figures in (saes | also).items()}


def _load(folder: Path, hook: str, config: EvaluateConfig, store: ActivationStore) -> SavedSae:
    """The SAE of a hook; the features that the settings name are checked now, before minutes of work."""
    path = folder / "best" if config.sae == "best" else folder
    if config.sae == "best" and not path.exists():
        raise UserError(f"evaluate.sae: 'best': {path} does not exist: no look at held-out rows after the warm-up")
    saved = load_sae(path)
    if saved.sae.d_in != store.geometry.d_in:
        raise UserError(f"{path}: an SAE of d_in {saved.sae.d_in}; the store {store.path} has {store.geometry.d_in}")
    if saved.hook != hook:
        raise UserError(f"{path}: an SAE of {saved.hook}, in the place of that of {hook}; train it anew")
    if config.features:
        steering.check_features(config.features.include, saved.sae.d_sae, "evaluate.features.include")
    if config.steering:
        steering.check_features(config.steering.feature_ids, saved.sae.d_sae, "evaluate.steering.feature_ids")
    return saved


def _main_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Those of the report's first lines, without outliers; metrics.json has all."""
    kept = figures["fidelity"]["outliers_excluded"]["all"]
    out = {"L0": kept.get("l0"), "explained variance": kept.get("explained_variance")}
    if "downstream" in figures:
        out["loss recovered (ce_loss_score)"] = figures["downstream"]["all"].get("ce_loss_score")
    return out | {"dead features": f"{figures['features']['dead_fraction']:.2%}"}
