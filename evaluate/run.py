"""The evaluate stage: every SAE of a training run on held-out text, into metrics.json and report.html.

Shape suffixes: C contexts, S positions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from evaluate import ablation, diff, downstream, steering, token_injection
from evaluate.activity import write_activity
from evaluate.activity_sums import ActivitySums
from evaluate.config import EvaluateConfig
from evaluate.feature_pages import pages
from evaluate.fidelity import NAMES, Fidelity, FidelitySums, density_figures
from evaluate.figures import KEPT, Evaluation, Figure, Measured, Section, definitions, figures_of, write_figures
from evaluate.groups import context_groups, finest
from evaluate.operations import check_features
from evaluate.reason_score import Scoring, sources_read
from evaluate.report import write_report
from evaluate.subject import Reader, Subject, feed
from evaluate.token_identity import TokenSums, write_identity
from evaluate.unembedding import load_unembedding
from harvest.activation_rows import stored_rows
from harvest.activation_store import ActivationStore, slug
from harvest.config import ModelConfig
from harvest.contexts import Contexts
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, replacing
from harvest.language_model import load_model
from harvest.stage_directory import Run
from harvest.store_files import files_of
from harvest.tokenizer import load_tokenizer, load_whole_tokenizer
from train.checkpoint import SavedSae, load_sae
from train.config import ExcludeConfig
from train.published import load_published
from train.published_config import PublishedExclude

OF_TEXT = (
    "downstream",
    "reason_score",
    "token_injection",
    "feature_pages",
    "steering",
    "ablation",
    "diff",
)  # they need the model or its text


def run(
    model_config: ModelConfig | None,
    model_commit: str | None,
    config: EvaluateConfig,
    also_commits: Sequence[str | None],
    before: dict[str, Run],
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `directory/metrics.json` and `report.html` and return the main figures.

    `before` are the runs of the stages before, by name; without a sample there is no text, and the analyses `OF_TEXT`
    are left out. `also_commits` are the hub commits of `config.also`, None for local ones.

    Raises UserError for an SAE that does not fit the store or the model, and for held-out text that is
    damaged or missing.
    """
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.downstream.compute_dtype if config.downstream else "auto", device)
    threads = set_threads(config.runtime.threads, device)
    begin(numerics(device, dtype, threads=threads if device.type == "cpu" else None))
    left_out: list[str] = list(OF_TEXT) if model_config is None else []
    if left_out:
        print(f"evaluate: left out, as ingested rows have no model and no text: {', '.join(left_out)}", flush=True)
    manifests, trained = {name: run.manifest for name, run in before.items()}, before["train"].path
    own = own_subjects(model_config, model_commit, config, before, dtype, device, directory)
    store, statistics = own[0].store, {subject.saved.hook: subject.saved.statistics for subject in own}
    # All of them before the first is measured, so that what does not fit is said at once.
    of_others = [
        own[0]._replace(
            saved=load_published(
                f"evaluate.also ({also.name})", also, commit, store, statistics.__getitem__, config.runtime.offline
            ),
            name=also.name,
        )
        for also, commit in zip(config.also, also_commits, strict=True)
    ]
    measured = [measure(subject.on_device(), left_out) for subject in (*own, *of_others)]
    inputs = {name: manifest["fingerprint"] for name, manifest in manifests.items()}
    steering_texts = {name: {"text": text} for name, text in steering.DEFINITIONS.items()}
    evaluation = Evaluation(
        directory.name, inputs, config.sae, left_out, tuple(measured), definitions() | {"steering": steering_texts}
    )
    write_figures(directory, evaluation)
    write_report(directory / "report.html", evaluation, curves_of(trained, manifests, store), manifests)
    return {sae.name or sae.hook: _main_figures(sae) for sae in measured}


def own_subjects(
    model_config: ModelConfig | None,
    model_commit: str | None,
    config: EvaluateConfig,
    before: dict[str, Run],
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
) -> list[Subject]:
    """The run's own SAEs, one a hook, with all that an analysis reads; `before` as `run` takes it.

    Raises UserError for an SAE that does not fit the store, and for a store that is not complete.
    """
    store = ActivationStore.open(files_of(before["harvest"].path))
    store.check_complete(("holdout",))
    contexts = Contexts(before["sample"].path / "contexts") if "sample" in before else None
    given, text = cast(ModelConfig, model_config), cast(Contexts, contexts)  # None only where nothing reads them
    hooks, offline = store.geometry.hooks, config.runtime.offline
    shared = (
        context_groups(text, "holdout") if contexts else {},
        cache(partial(load_model, given, model_commit, hooks, dtype, device, offline=offline, with_head=True)),
        cache(partial(load_tokenizer, given, model_commit, offline)),
        cache(partial(load_unembedding, given, model_commit, offline)),
        cache(partial(load_whole_tokenizer, given, model_commit, offline)),
    )
    manifest = before["train"].manifest
    kind = PublishedExclude if "published" in manifest["inputs"] else ExcludeConfig
    exclude = kind(**manifest["settings"]["exclude"])
    own = [_load(before["train"].path / slug(hook), hook, config, store) for hook in hooks]
    return [Subject(saved, store, exclude, text, *shared, config, device, directory) for saved in own]


def curves_of(trained: Path, manifests: dict[str, dict[str, Any]], store: ActivationStore) -> dict[str, Path]:
    """The logs of training by hook; none of an SAE of others."""
    hooks = () if "published" in manifests["train"]["inputs"] else store.geometry.hooks
    return {hook: trained / slug(hook) / "metrics.jsonl" for hook in hooks}


def write_with(
    directory: Path, evaluation: Evaluation, section: str, before: Mapping[str, Run], store: ActivationStore
) -> None:
    """metrics.json and report.html of a later stage: an evaluation's, to whose SAEs it has added a section.

    `before` are the runs of the stages before that one, by name.
    """
    manifests = {name: stage.manifest for name, stage in before.items()}
    evaluation = evaluation._replace(
        fingerprint=directory.name,
        inputs={name: manifest["fingerprint"] for name, manifest in manifests.items()},
        definitions=evaluation.definitions | {section: definitions()[section]},
    )
    write_figures(directory, evaluation)
    write_report(directory / "report.html", evaluation, curves_of(before["train"].path, manifests, store), manifests)


def measure(subject: Subject, left_out: Sequence[str]) -> Measured:
    """All analyses of an SAE. The held-out rows are read and encoded once; of third-party SAEs there are fewer.

    Raises UserError when training's exclusions leave none of the rows.
    """
    config, saved, g = subject.config, subject.saved, subject.store.geometry
    is_whole = not subject.name and not left_out
    sums = FidelitySums(saved, subject.groups, subject.device)
    scoring = Scoring(subject, config.reason_score) if config.reason_score and is_whole else None
    activity = None
    if config.features and not subject.name:
        tokens_CS, groups = np.zeros((0, 0), np.uint32), (["all"], np.zeros(0, np.int64))
        if is_whole:
            count = subject.contexts.count("holdout")
            tokens_CS, groups = subject.contexts.read("holdout", "tokens", 0, count), finest(subject.groups, count)
        activity = ActivitySums(saved.sae.d_sae, tokens_CS, groups, g.shard_contexts, config.features)
    identity = TokenSums.of(subject) if config.token_injection and is_whole else None
    readers: list[Reader] = [reader for reader in (sums, scoring and scoring.sums, activity, identity) if reader]
    rows = stored_rows(subject.store, "holdout", subject.rules, config.batch_rows, contexts=subject.contexts)
    feed(saved, subject.counted(rows, "held-out rows", g.holdout_shards * g.shard_rows), readers)
    heldout = sums.result()
    if not heldout.figures[KEPT]["all"]["rows"]:
        raise UserError(
            f"{subject.exclude.setting}: {subject.exclude.model_dump()}: leaves none of the held-out rows of "
            f"{subject.store.path}"
        )
    sections = _of_rows(subject, heldout)
    if not left_out and config.downstream:
        by_group = {"": downstream.analyse(subject, heldout.mean_D)}
        sections["downstream"] = Section(_by_group("downstream", by_group, downstream.NAMES), {})
    sections["reason_score"] = scored = scoring.section() if scoring else None
    if identity:
        sources = subject.contexts.sources
        by_token = identity.result(sources, sources_read(config.reason_score, sources))
        write_identity(subject.file("token_identity", ".npz"), by_token)
        for row in scored.lists.get("top", ()) if scored else ():
            row |= by_token.of(row["feature"])
        sections["token_injection"] = token_injection.analyse(subject, heldout.density_F, by_token)
    if activity:
        found = activity.result()
        write_activity(subject.file("activity", ".safetensors"), found)
        injected = sections.get("token_injection")
        if is_whole:
            sections["feature_pages"] = pages(subject, found, injected.lists["features"] if injected else [])
    if is_whole:
        steered = steering.analyse(subject, heldout)
        sections["steering"] = Section([], steered) if steered else None
        sections["ablation"] = ablation.analyse(subject)
        sections["diff"] = diff.analyse(subject, heldout.by_group)
    made = {name: section for name, section in sections.items() if section}
    figures = tuple(figure for section in made.values() for figure in section.figures)
    lists = {name: section.lists for name, section in made.items() if section.lists}
    about = saved.about if subject.name else saved.about.get("published", {})
    return Measured(subject.name, saved.hook, about, figures, lists)


def _of_rows(subject: Subject, heldout: Fidelity) -> dict[str, Section | None]:
    """Sections that need the rows alone; densities of all features go to `density-<hook>.npy`."""
    with replacing(subject.file("density", ".npy")) as partial, partial.open("wb") as file:
        np.save(file, heldout.density_F)
    density, histogram = density_figures(heldout.density_F)
    statistics = subject.saved.statistics._asdict()
    return {
        "fidelity": Section(_by_group("fidelity", heldout.figures, NAMES), {}),
        "features": Section(figures_of("features", density), {"log10_density_histogram": histogram}),
        "statistics": Section(figures_of("statistics", statistics), {}),
    }


def _by_group(section: str, found: dict[str, dict[str, dict[str, Any]]], names: Sequence[str]) -> list[Figure]:
    """The figures of rows -> group -> name."""
    return [
        figure
        for rows, groups in found.items()
        for group, values in groups.items()
        for figure in figures_of(section, values, rows, group, names)
    ]


def _load(folder: Path, hook: str, config: EvaluateConfig, store: ActivationStore) -> SavedSae:
    """The SAE of a hook; the features that the settings name are checked now, before minutes of work."""
    path = folder / "best" if config.sae == "best" else folder
    if config.sae == "best" and not path.exists():
        raise UserError(
            f"evaluate.sae: 'best': {path} does not exist: no look at held-out rows after the warm-up; take last"
        )
    saved = load_sae(path)
    if saved.sae.d_in != store.geometry.d_in:
        raise UserError(f"{path}: an SAE of d_in {saved.sae.d_in}; the store {store.path} has {store.geometry.d_in}")
    if saved.hook != hook:
        raise UserError(f"{path}: an SAE of {saved.hook}, in the place of that of {hook}; train it anew")
    if config.features:
        check_features(config.features.include, saved.sae.d_sae, "evaluate.features.include")
    if config.steering:
        check_features(config.steering.feature_ids, saved.sae.d_sae, "evaluate.steering.feature_ids")
    return saved


def _main_figures(sae: Measured) -> dict[str, Any]:
    """Those of the report's first lines, without outliers; metrics.json has all."""
    out: dict[str, Any] = {"L0": sae.value("l0"), "explained variance": sae.value("explained_variance")}
    if sae.figure("ce_loss_score"):
        out["loss recovered (ce_loss_score)"] = sae.value("ce_loss_score")
    return out | {"dead features": f"{sae.value('dead_fraction'):.2%}"}
