"""`pipeline export`: the SAEs of a run, or of a whole sweep, as SAELens folders with a model card.

<folder>/README.md           the model card
<folder>/<sae>/cfg.json      and sae_weights.safetensors; <sae> is the hook's name, in a sweep with what was swept
<folder>/<sae>/explanations.jsonl   what features mean, where `pipeline explain` said so
<folder>/export.json         which runs these are, and the files written
"""

import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harvest.files import UserError
from harvest.hub import resolved_commit
from harvest.source_files import is_local, looks_local
from harvest.sources import hub_errors
from pipeline.config import PipelineConfig
from pipeline.metrics import read_evaluation
from pipeline.running import trained
from pipeline.stages import Runs, explained, swept
from train.config import said
from train.published_config import PLACE

if TYPE_CHECKING:
    from train.checkpoint import SavedSae  # loads torch

EXPLANATIONS = "explanations.jsonl"
# Figures of the card, and how each is written.
FIGURES = {
    "l0": "{:.1f}",
    "explained_variance": "{:.3f}",
    "explained_variance_legacy": "{:.3f}",
    "ce_loss_score": "{:.3f}",
    "dead_fraction": "{:.2%}",
}
# What `make setup` fetches (configs/assets.txt), and its licences.
SHIPPED = {"assets/smollm2-135m": "apache-2.0", "assets/champ": "mit", "assets/chitchat": "mit"}
# Hub ids, in small letters, that TransformerLens 3.9's HookedTransformer loads by name.
TRANSFORMER_LENS = frozenset(Path(__file__).with_name("transformer_lens.txt").read_text(encoding="utf-8").split())


class Terms(NamedTuple):
    """Under which terms a data set may be passed on."""

    licence: str | None  # as the hub writes it; None where it is not known
    note: str  # for people; "open" is known to be neither gated nor private


class Exported(NamedTuple):
    """One SAE of an export."""

    runs: Runs
    hook: str  # as the settings name it
    folder: str  # relative to the export
    source: Path  # of the SAE


def export(sweep: Sequence[Runs], to: Path | None, model_name: str | None, force: bool) -> Path:
    """Write the export and return its folder, by default `<runs>/export/<fingerprint>`.

    `model_name` is the hub id of a model that the settings name by a local folder. Raises UserError for a run
    that is not trained, and for a folder that holds anything but an older export.
    """
    saes = [sae for runs in sweep for sae in _saes(runs, sweep)]
    if model_name is not None and looks_local(model_name):
        raise UserError(f"--model-name {model_name!r}: a hub id is owner/name")
    model = model_name or _public_name(sweep[0].config.model.name)
    terms = [source_terms(source.path) for source in sweep[0].config.sample.sources]
    from train.checkpoint import load_sae
    from train.export import new_export
    from train.saelens import write_saelens_folder

    folder = to or sweep[0].root / "export" / export_name(sweep)
    listed = [{"folder": sae.folder, "hook": sae.hook, **_origin(sae.runs)} for sae in saes]
    with new_export(folder, {"saes": listed, "model": model}, force) as partial:
        rows = []
        for sae in saes:
            saved = load_sae(sae.source)
            write_saelens_folder(partial / sae.folder, saved.sae, _metadata(sae, model) | _training_of_others(saved))
            if lines := _explanations(sae, model):
                (partial / sae.folder / EXPLANATIONS).write_text("".join(lines), encoding="utf-8")
            rows.append(_card_row(sae, saved.sae))
        (partial / "README.md").write_text(_card(saes, rows, model, terms), encoding="utf-8")
    return folder


def export_name(sweep: Sequence[Runs]) -> str:
    """The train fingerprint; of a sweep, a hash of all of them."""
    names = [runs.fingerprints["train"] for runs in sweep]
    return names[0] if len(names) == 1 else hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]


def source_terms(path: str) -> Terms:
    """Terms of a data set; asks the hub, and does not fail where it cannot be asked."""
    if path in SHIPPED:
        return Terms(SHIPPED[path], "open")
    if is_local(path):
        return Terms(None, "local files")
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(path, timeout=10)
    except hub_errors() as error:
        return Terms(None, f"not looked up ({type(error).__name__})")
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    text = ", ".join(licence) if isinstance(licence, list) else licence
    return Terms(text, "gated" if info.gated else "private" if info.private else "open")


def closed_sources(config: PipelineConfig) -> list[str]:
    """The sources that are not known to be open, each with what is known of it: their text stays on this machine."""
    terms = {source.name: source_terms(source.path) for source in config.sample.sources}
    return [f"{name} ({term.note})" for name, term in terms.items() if term.note != "open"]


def _saes(runs: Runs, sweep: Sequence[Runs]) -> list[Exported]:
    directory = trained(runs, "export")
    from harvest.activation_store import slug
    from harvest.language_model import saelens_hook

    best = runs.config.evaluate.sae == "best"
    out = []
    for hook in runs.config.harvest.hooks:
        source = directory / slug(hook)
        if best and not (source / "best").exists():
            raise UserError(
                f"evaluate.sae: 'best': {source / 'best'} does not exist; evaluate.sae=last exports the last one"
            )
        folder = "/".join(filter(None, (slug(saelens_hook(hook) or hook), swept(runs, sweep, "_", "-"))))
        out.append(Exported(runs, hook, folder, source / "best" if best else source))
    return out


def _metadata(sae: Exported, model: str) -> dict[str, Any]:
    """Metadata of cfg.json under SAELens' names."""
    from harvest.language_model import saelens_hook

    config, module, sample = sae.runs.config, _module(sae), sae.runs.of("sample")
    bos = sample.summary.get("bos") if sample.is_complete else None
    at_layer = saelens_hook(module)
    known = at_layer if model.lower() in TRANSFORMER_LENS else None
    layer = re.search(r"\.(\d+)(\.|$)", module)
    return {
        "model_name": model,
        "model_class_name": "HookedTransformer" if known else "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {},
        "hook_name": known or module,
        "hf_hook_name": module,
        "transformer_lens_hook_name": at_layer,
        "hook_layer": int(layer[1]) if layer else None,
        "hook_head_index": None,
        "context_size": config.sample.context_size,
        "prepend_bos": bos in ("document", "context"),
        "exclude_special_tokens": list(config.exclude.token_ids) or False,
        # Of several, a name that no loader takes for one of them.
        "dataset_path": ", ".join(_public_name(source.path) for source in config.sample.sources),
        "reasoning_sae": _origin(sae.runs),
    }


def _explanations(sae: Exported, model: str) -> list[str]:
    """A line of JSON for each explained feature, under Neuronpedia's names and ours; the newest run speaks last."""
    found: dict[int, dict[str, Any]] = {}
    for run in reversed(explained(sae.runs)):
        measured = read_evaluation(run).own(sae.hook)
        lists = measured.lists["explanations"] if measured else {"features": []}
        for each in lists["features"]:
            if each["label"]:
                found[each["feature"]] = {
                    "modelId": model,
                    "layer": sae.folder,
                    "index": each["feature"],
                    "description": each["sentence"],
                    "explanationModelName": lists["model"],
                    "label": each["label"],
                    **{name: each[name] for name in ("detection", "fuzzing", "control", "control_fuzzing")},
                }
    return [json.dumps(found[feature], ensure_ascii=False) + "\n" for feature in sorted(found)]


def _training_of_others(saved: "SavedSae") -> dict[str, Any]:
    """What its cfg.json says of the training of a published SAE, in the place of our text; nothing of our own."""
    if "published" not in saved.about:
        return {}
    theirs = saved.about["published"].get("cfg", {})
    said = {name: theirs.get(name) for name in ("dataset_path", "context_size", "prepend_bos")}
    return {**said, "exclude_special_tokens": False}


def _origin(runs: Runs) -> dict[str, str]:
    return {"train": runs.fingerprints["train"], "which_sae": runs.config.evaluate.sae}


def _module(sae: Exported) -> str:
    """The module path of a hook, which the settings may name as SAELens does."""
    from harvest.language_model import SAELENS_NAME, find_hook, load_skeleton

    if not SAELENS_NAME.fullmatch(sae.hook):
        return sae.hook
    config = sae.runs.config
    commit = resolved_commit(sae.runs.inputs.model)
    return find_hook(load_skeleton(config.model, commit, config.harvest.runtime.offline), sae.hook).module


def _public_name(name: str) -> str:
    """A hub id as it is; of a local path its last part alone, as paths tell of the machine."""
    return Path(name).name if is_local(name) else name


def _card(saes: list[Exported], rows: list[dict[str, Any]], model: str, terms: list[Terms]) -> str:
    runs, manifest = saes[0].runs, saes[0].runs.of("train").manifest
    contents = [content.removeprefix("hub:").rpartition("@")[2][:19] for content in runs.inputs.sources]
    hub = [source.path for source in runs.config.sample.sources if not is_local(source.path)]
    front: dict[str, Any] = {"library_name": "saelens", "tags": ["sparse-autoencoder", "saelens", "interpretability"]}
    front |= {"datasets": hub} if hub and not runs.config.published else {}
    front |= {"base_model": model} if not looks_local(model) else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "public": _public_name}
    return environment.get_template("model_card.md").render(
        front_matter=yaml.safe_dump(front, sort_keys=True, allow_unicode=True),
        saes=rows,
        model=model,
        definitions=next((row["definitions"] for row in rows if row["evaluated"]), {}),
        sample=runs.config.sample,
        sources=list(zip(runs.config.sample.sources, contents, terms, strict=True)),
        settings=_card_settings(manifest, single=len(saes) == 1),
        exclude=manifest["settings"]["exclude"],
        published=_origin_of_others(runs),
        versions=manifest["versions"],
    )


def _origin_of_others(runs: Runs) -> dict[str, str] | None:
    """What the card says of where a published SAE is from."""
    published = runs.config.published
    if published is None:
        return None
    public = (
        "/".join(filter(None, (_public_name(published.path), published.file))) if published.path else published.label
    )
    content = str(runs.inputs.published)
    return {"label": public, "version": resolved_commit(content) or content[:19]}


def _card_settings(manifest: dict[str, Any], single: bool) -> dict[str, Any]:
    """Settings of the training; what it started from by its training run or name, and content."""
    settings = {name: value for name, value in manifest["settings"].items() if name != "sae" or single}
    if "published" in manifest["inputs"]:  # the card says where it is from
        settings = {name: value for name, value in settings.items() if name not in PLACE}
    if start := settings.get("start_from"):
        from train.start_files import train_run

        run, content = train_run(Path(start["path"])), manifest["inputs"]["start"]
        name = f"training run {run.path.name}" if run else _public_name(start["path"])
        settings["start_from"] = f"{name}, {content.removeprefix('hub:').rpartition('@')[2][:40]}"
    return settings


def _code(value: Any) -> str:
    """Text of a setting as Markdown code within a table: it can end neither."""
    return "`" + " ".join(str(value).replace("`", "'").replace("|", "¦").split()) + "`"


def _card_row(sae: Exported, trained: Any) -> dict[str, Any]:
    run, config = sae.runs.of("evaluate"), sae.runs.config
    formula = " ".join((inspect.getdoc(type(trained)) or "").split())
    measured = read_evaluation(run).own(sae.hook) if run.is_complete else None
    figures = {name: measured.figure(name) if measured else None for name in FIGURES}
    return {
        "folder": sae.folder,
        "hook": sae.hook,
        "d_in": trained.d_in,
        "d_sae": trained.d_sae,
        "formula": formula if config.train else formula.partition(", loss ")[0],  # whose loss is not known
        "said": config.train.sae.said(everything=True) if config.train else said(trained.kind, trained.settings()),
        "figures": [form.format(f.value) if (f := figures[name]) else "–" for name, form in FIGURES.items()],
        "evaluated": measured is not None,
        "definitions": {name: figure.definition if figure else "" for name, figure in sorted(figures.items())},
    }
