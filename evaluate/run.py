"""The evaluate stage: every SAE of a training run on held-out text, into metrics.json and report.html."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate import downstream, fidelity
from evaluate.config import EvaluateConfig
from evaluate.report import write_report
from harvest.activation_store import ActivationStore, slug
from harvest.config import ModelConfig
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, write_json
from harvest.language_model import HookedModel, load_model
from harvest.progress import Progress
from harvest.sampling import Contexts
from train.checkpoint import SavedSae, load_sae
from train.config import ExcludeConfig


class Upstream(NamedTuple):
    """Directories of the stages before, and their manifests by name."""

    sample: Path
    harvest: Path
    train: Path
    manifests: dict[str, dict[str, Any]]


def run(
    model_config: ModelConfig,
    model_commit: str | None,
    config: EvaluateConfig,
    upstream: Upstream,
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `directory/metrics.json` and `report.html` and return the main figures.

    Raises UserError for an SAE that does not fit the store or the model, and for held-out text that is
    damaged or missing.
    """
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.downstream.compute_dtype if config.downstream else "auto", device)
    threads = set_threads(config.runtime.threads, device)
    begin(numerics(device, dtype, threads=threads if device.type == "cpu" else None))
    store = ActivationStore.open(upstream.harvest / "store")
    store.check_complete(("holdout",))
    contexts = Contexts(upstream.sample / "contexts")
    context_source = contexts.read("holdout", "source", 0, contexts.count("holdout"))
    exclude = ExcludeConfig(**upstream.manifests["train"]["settings"]["exclude"])
    model = None
    if config.downstream:
        model = load_model(
            model_config,
            model_commit,
            store.geometry.hooks,
            dtype,
            device,
            offline=config.runtime.offline,
            with_head=True,
        )
    saes: dict[str, Any] = {}
    for hook in store.geometry.hooks:
        saved = _load(upstream.train / slug(hook), config.sae, store)
        saved = saved._replace(sae=saved.sae.to(device))
        saes[hook] = _evaluate(saved, store, exclude, contexts, context_source, model, config, device, directory)
    definitions = {
        "fidelity": fidelity.DEFINITIONS,
        "features": fidelity.DENSITY_DEFINITIONS,
        "downstream": downstream.DEFINITIONS,
        "outliers_excluded": "rows that training leaves out (train.exclude) are not counted",
        "all_rows": "every held-out row is counted",
    }
    inputs = {name: manifest["fingerprint"] for name, manifest in upstream.manifests.items()}
    metrics = {
        "schema": 1,
        "inputs": inputs,
        "which_sae": config.sae,
        "saes": saes,
        "definitions": definitions,
    }
    write_json(directory / "metrics.json", metrics)
    curves = {hook: upstream.train / slug(hook) / "metrics.jsonl" for hook in saes}
    write_report(directory / "report.html", metrics, curves, upstream.manifests)
    return {hook: _main_figures(figures) for hook, figures in saes.items()}


def _load(folder: Path, which: str, store: ActivationStore) -> SavedSae:
    path = folder / "best" if which == "best" else folder
    if which == "best" and not path.exists():
        raise UserError(f"evaluate.sae: 'best': {path} does not exist: no look at held-out rows after the warm-up")
    saved = load_sae(path)
    if saved.sae.d_in != store.geometry.d_in:
        raise UserError(f"{path}: an SAE of d_in {saved.sae.d_in}; the store {store.path} has {store.geometry.d_in}")
    return saved


def _evaluate(
    saved: SavedSae,
    store: ActivationStore,
    exclude: ExcludeConfig,
    contexts: Contexts,
    context_source: np.ndarray,
    model: HookedModel | None,
    config: EvaluateConfig,
    device: torch.device,
    directory: Path,
) -> dict[str, Any]:
    g = store.geometry
    title = f"fidelity {saved.hook}"
    with Progress(title, g.holdout_shards * g.shard_rows, "rows", path=directory / "progress.json") as progress:

        def counted() -> Any:
            for batch in fidelity.heldout_batches(store, saved, exclude, context_source, config.batch_rows):
                yield batch
                progress.advance(len(batch.rows_BD))

        found = fidelity.fidelity(saved, counted(), contexts.sources, device)
    figures: dict[str, Any] = {
        "fidelity": found.figures,
        "features": fidelity.density_figures(found.density_F),
        "statistics": saved.statistics._asdict(),
    }
    np.save(directory / f"density-{slug(saved.hook)}.npy", found.density_F)
    if model and config.downstream:
        count = min(config.downstream.contexts, len(context_source))
        ids = contexts.read("holdout", "tokens", 0, count)
        title = f"downstream {saved.hook}"
        with Progress(title, ids.size, "tokens", path=directory / "progress.json") as progress:
            figures["downstream"] = downstream.downstream(
                model,
                saved,
                exclude,
                found.mean_D,
                ids,
                context_source[:count],
                contexts.sources,
                config.downstream.batch_contexts,
                progress,
            )
    return figures


def _main_figures(figures: dict[str, Any]) -> dict[str, Any]:
    kept = figures["fidelity"]["outliers_excluded"]["all"]
    every = figures["fidelity"]["all_rows"]["all"]
    out = {
        "L0": kept.get("l0"),
        "explained variance": kept.get("explained_variance"),
        "explained variance (legacy)": kept.get("explained_variance_legacy"),
        "dead features": f"{figures['features']['dead_fraction']:.2%}",
        "all rows: L0": every["l0"],
        "all rows: explained variance": every["explained_variance"],
        "all rows: explained variance (legacy)": every["explained_variance_legacy"],
    }
    if "downstream" in figures:
        down = figures["downstream"]["all"]
        for name in (
            "ce_clean",
            "ce_sae",
            "ce_zero_ablated",
            "ce_loss_score",
            "ce_sae_all_rows",
            "ce_loss_score_all_rows",
        ):
            out[name] = down.get(name)
    return out
