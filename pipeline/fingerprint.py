"""What a stage's result depends on, as 12 hex digits.

fingerprint = sha256(stage, its version, upstream fingerprint, inputs by content, settings without
`runtime`). Local models and data enter by content, hub ones by commit; neither by path.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluate.config import EVALUATE_VERSION, PublishedSae
from harvest.config import HARVEST_VERSION, SAMPLE_VERSION, ModelConfig, Settings, Source
from harvest.files import UserError
from harvest.hub import hub_answers
from harvest.source_files import find_files, is_local, looks_local, nearest_hint
from harvest.sources import files_within, hub_errors, ingest_files
from pipeline import assets
from pipeline.config import IngestedConfig, PipelineConfig
from pipeline.content import ContentHashes
from train.config import TRAIN_VERSION

STAGES = ("sample", "harvest", "train", "evaluate")
VERSIONS: dict[str, int] = dict(
    zip(STAGES, (SAMPLE_VERSION, HARVEST_VERSION, TRAIN_VERSION, EVALUATE_VERSION), strict=True)
)
# What transformers may read of a model's folder; tests/test_inputs.py holds it against what it opens.
WEIGHT_FILES = re.compile(r"(adapter_)?config(\..+)?\.json|.*\.safetensors|.*\.safetensors\.index\.json")
TOKENIZER_FILES = re.compile(
    r"config(\..+)?\.json|(tokenizer.*|special_tokens_map|added_tokens|vocab.*|.*_vocab|merges|dict|tekken|normalizer"
    r"|emoji|byte_maps|word_.*)\.(json|txt)|tokenizer\.model.*|.*\.(model|spm|codes|tokenizer)"
)
CHAT_TEMPLATE_FILES = re.compile(r"chat_template\.(jinja|json)|additional_chat_templates/.*\.jinja")
GENERATION_FILES = re.compile(r"generation_config\.json")
SETUP = [str(assets.ASSETS / name) for name in assets.NAMES]
COMMIT = re.compile(r"[0-9a-f]{40}")


class Inputs(NamedTuple):
    """What stands behind the names in the settings: content hashes, or `hub:<name>@<commit>`."""

    tokenizer: str | None
    model: str | None
    sources: tuple[str, ...]
    activations: str | None = None
    also: tuple[str, ...] = ()  # evaluate.also
    diff: str | None = None  # the second model of evaluate.diff
    generation: str | None = None  # how a local model begins and ends its answers, which evaluate.steering reads

    def known(self, stage: str) -> dict[str, Any]:
        """Those that there are; the SAEs of others, a second model and generation concern evaluate alone."""
        of_others = () if stage == "evaluate" else ("also", "diff", "generation")
        return {name: value for name, value in self._asdict().items() if value and name not in of_others}


def hashed_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a fingerprint holds: all but `runtime`.

    A setting that came later, marked `Field(json_schema_extra={"added": True})`, is left out while it
    has its default, so that older results stay valid.
    """
    out: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        extra = field.json_schema_extra
        added = isinstance(extra, dict) and extra.get("added")
        if name == "runtime" or (added and value == field.get_default(call_default_factory=True)):
            continue
        if isinstance(value, Settings):
            value = hashed_settings(value)
        elif isinstance(value, tuple):
            value = [hashed_settings(v) if isinstance(v, Settings) else v for v in value]
        out[name] = value
    return out


def fingerprints(config: PipelineConfig | IngestedConfig, inputs: Inputs) -> dict[str, str]:
    """The fingerprint of every stage that these settings have."""
    parts: dict[str, tuple[dict[str, Any], Any]]
    if isinstance(config, IngestedConfig):
        ingest = {k: v for k, v in hashed_settings(config.ingest).items() if k not in ("path", "token_ids")}
        parts = {"harvest": ({"ingest": ingest}, inputs.activations)}
    else:
        sample = hashed_settings(config.sample)
        for source, content in zip(sample["sources"], inputs.sources, strict=True):
            del source["path"], source["revision"]
            source["content"] = content
        parts = {"sample": (sample, inputs.tokenizer), "harvest": (hashed_settings(config.harvest), inputs.model)}
    evaluate = hashed_settings(config.evaluate)
    for published, content in zip(evaluate.get("also", ()), inputs.also, strict=True):
        del published["path"], published["revision"], published["file"]
        published["content"] = content
    parts["train"] = (hashed_settings(config.train), None)
    read = {"diff": inputs.diff, "generation": inputs.generation} if inputs.generation else inputs.diff
    parts["evaluate"] = (_without_name(evaluate), read)
    out: dict[str, str] = {}
    upstream = None
    for stage, (settings, content) in parts.items():
        document = [stage, VERSIONS[stage], upstream, content, settings]
        upstream = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]
        out[stage] = upstream
    return out


def _without_name(evaluate: dict[str, Any]) -> dict[str, Any]:
    """The settings of evaluate, whose second model enters by content."""
    diff = evaluate.get("diff")
    return evaluate | {"diff": diff | {"model": None}} if diff and diff["model"] else evaluate


def find_inputs(config: PipelineConfig | IngestedConfig, runs: Path) -> Inputs:
    """Identify model and data, or activations; hashes and resolved commits are remembered in runs/.inputs.json.

    Raises UserError for what is not there, or a hub branch that cannot be resolved.
    """
    memory = Memory(runs / ".inputs.json")
    inputs = identify(config, memory)
    memory.save()
    return inputs


def identify(config: PipelineConfig | IngestedConfig, memory: "Memory", stages: Sequence[str] = STAGES) -> Inputs:
    """What these stages read of models, data and activations; what others read is left empty.

    Raises UserError as `find_inputs` does.
    """
    also, second, activations = (), None, None
    if "evaluate" in stages:
        also = tuple(_published_identity(i, published, memory) for i, published in enumerate(config.evaluate.also))
        model = config.evaluate.diff.model if config.evaluate.diff else None
        both = (WEIGHT_FILES, TOKENIZER_FILES)
        second = _model_identity(model, both, memory, "evaluate.diff.model.name") if model else None
    if isinstance(config, IngestedConfig):
        if "harvest" in stages:
            parts = [[file for path in paths for file in files_within(path)] for paths in ingest_files(config.ingest)]
            activations = "+".join(memory.files_hash(files) for files in parts if files)
        return Inputs(None, None, (), activations, also, second)
    model, sources, generation = None, (), None
    if "harvest" in stages or "evaluate" in stages:
        model = _model_identity(config.model, (WEIGHT_FILES,), memory)
    if "sample" in stages:
        sources = tuple(_source_identity(i, source, memory) for i, source in enumerate(config.sample.sources))
    if "evaluate" in stages and Path(config.model.name).is_dir():
        generation = _model_identity(config.model, (CHAT_TEMPLATE_FILES, GENERATION_FILES), memory)
    reads_tokenizer = "sample" in stages or "evaluate" in stages
    return Inputs(
        _model_identity(config.model, (TOKENIZER_FILES, CHAT_TEMPLATE_FILES), memory) if reads_tokenizer else None,
        model,
        sources,
        activations,
        also,
        second,
        generation,
    )


class Memory(ContentHashes):
    """Content hashes of files; hub commits by name and branch."""

    def commit(self, kind: str, name: str, revision: str | None, setting: str) -> str:
        """`hub:<name>@<commit>` of a model or data set; the commit of a branch is asked for once.

        Raises UserError where the hub does not give it.
        """
        branch = revision or "main"
        if COMMIT.fullmatch(branch):
            return f"hub:{name}@{branch}"
        return f"hub:{name}@" + self.get(f"{kind}:{name}@{branch}", lambda: _resolve(kind, name, branch, setting))


def _resolve(kind: str, name: str, branch: str, setting: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    no_answer = (
        f"{setting}: {name!r} is no local path, and the hub does not answer for its branch {branch!r}; go online once, "
        "or set the revision to a full commit hash"
    )
    if not hub_answers():
        raise UserError(no_answer)
    try:
        commit = HfApi().repo_info(name, repo_type=kind, revision=branch, timeout=20).sha
    except GatedRepoError:
        raise UserError(
            f"{setting}: {name!r} is gated: accept its terms at https://huggingface.co/{_page(kind, name)}, "
            "then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{setting}: {name!r}: neither a local path nor a {kind} on the hub (or one that needs HF_TOKEN)"
        ) from None
    except hub_errors() as error:
        raise UserError(f"{no_answer} ({type(error).__name__})") from None
    if not commit or not COMMIT.fullmatch(commit):
        raise UserError(f"{setting}: the hub gives no commit for {name!r} at {branch!r}")
    return commit


def _page(kind: str, name: str) -> str:
    return f"datasets/{name}" if kind == "dataset" else name


def _model_identity(
    model: ModelConfig, kinds: Sequence[re.Pattern[str]], memory: Memory, setting: str = "model.name"
) -> str:
    """The content of a model's files of some kinds.

    Raises UserError for a folder that holds no model, or no tokenizer where that is asked for.
    """
    folder = Path(model.name)
    if not folder.is_dir():
        if looks_local(model.name):
            raise UserError(f"{setting}: {model.name!r}: no such folder{_setup_hint(model.name)}")
        return memory.commit("model", model.name, model.revision, setting)
    inside = {path.relative_to(folder).as_posix(): path for path in [*folder.iterdir(), *folder.glob("*/*.jinja")]}
    names = sorted(name for name in inside if any(kind.fullmatch(name) for kind in kinds) and inside[name].is_file())
    if "config.json" not in inside or (names == ["config.json"] and TOKENIZER_FILES in kinds):
        raise UserError(
            f"{setting}: {model.name!r}: needs config.json, *.safetensors and tokenizer files; it holds "
            f"{', '.join(sorted(inside)[:8]) or 'nothing'}"
        )
    return memory.files_hash([inside[name] for name in names], folder)


def _source_identity(i: int, source: Source, memory: Memory) -> str:
    setting = f"sample.sources.{i}"
    if not is_local(source.path):
        try:
            return memory.commit("dataset", source.path, source.revision, f"{setting}.path")
        except UserError as error:
            raise UserError(f"{error}{_setup_hint(source.path)}") from None
    try:
        return memory.files_hash(find_files(source, setting).files)
    except UserError as error:
        raise UserError(f"{error}{_setup_hint(source.path)}") from None


def _published_identity(i: int, published: PublishedSae, memory: Memory) -> str:
    setting = f"evaluate.also.{i}.path"
    if not looks_local(published.path) and not Path(published.path).exists():
        commit = memory.commit("model", published.path, published.revision, setting)
        return f"{commit}/{published.file}" if published.file else commit
    files = [Path(published.path, name) for name in published.files()]
    for path in files:
        if not path.is_file():
            raise UserError(f"{setting}: {published.path!r}: there is no file {path} (format {published.format})")
    return memory.files_hash(files)


def _setup_hint(name: str) -> str:
    return "; `make setup` puts it there" if name in SETUP else nearest_hint(name, SETUP)
