"""What the names in the settings mean: models, text and activations by content, what the hub has by commit.

Neither enters a fingerprint by its path, and settings enter without `runtime`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluate.task_config import task_of
from harvest.config import ModelConfig, Settings, Source
from harvest.files import UserError
from harvest.hub import hub_answers
from harvest.source_files import find_files, is_local, looks_local, nearest_hint
from harvest.sources import files_within, hub_errors, ingest_files
from pipeline import assets
from pipeline.config import PipelineConfig
from pipeline.content import ContentHashes
from train.config import StartFrom
from train.published_config import PublishedFiles
from train.saelens_releases import release_place
from train.start_files import find_start, is_on_hub

STAGES = ("sample", "harvest", "train", "evaluate")
EVERY_STAGE = (*STAGES, "explain", "benchmark")  # the last ones run where they are asked for
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
    """What the names in the settings mean: content hashes, or `hub:<name>@<commit>`."""

    tokenizer: str | None
    model: str | None
    sources: tuple[str, ...]
    activations: str | None = None
    also: tuple[str, ...] = ()  # evaluate.also
    diff: str | None = None  # the second model of evaluate.diff
    start: str | None = None  # train.start_from
    published: str | None = None  # the SAE in the place of training
    generation: str | None = None  # how a local model begins and ends its answers, which evaluate.steering reads
    task: str | None = None  # the problems of a benchmark, where they are read from a source

    def known(self, stage: str) -> dict[str, Any]:
        """Those that there are; third-party SAEs and a second model concern evaluate alone, generation also a
        benchmark, what training starts from no stage before it, and what stands in its place that alone."""
        of_others = () if stage == "evaluate" else ("also", "diff")
        of_others += () if stage in ("evaluate", "benchmark") else ("generation",)
        of_others += ("start",) if stage in ("sample", "harvest") else ()
        of_others += () if stage == "train" else ("published",)
        of_others += () if stage == "benchmark" else ("task",)
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
        if name == "runtime" or (added and value == field.get_default(call_default_factory=True, validated_data={})):
            continue
        if isinstance(value, Settings):
            value = hashed_settings(value)
        elif isinstance(value, tuple):
            value = [hashed_settings(v) if isinstance(v, Settings) else v for v in value]
        out[name] = value
    return out


def find_inputs(config: PipelineConfig, runs: Path) -> Inputs:
    """Identify model and data, or activations; hashes and resolved commits are remembered in runs/.inputs.json.

    Raises UserError for what is missing, or a hub branch that cannot be resolved.
    """
    memory = Memory(runs / ".inputs.json")
    inputs = identify(config, memory)
    memory.save()
    return inputs


def identify(config: PipelineConfig, memory: "Memory", stages: Sequence[str] = EVERY_STAGE) -> Inputs:
    """What these stages read of models, data and activations; what others read is left empty.

    Raises UserError as `find_inputs` does.
    """
    inputs = Inputs(None, None, ())
    if "evaluate" in stages:
        second = config.evaluate.diff and config.evaluate.diff.model
        also = [_published_identity(f"evaluate.also.{i}", sae, memory) for i, sae in enumerate(config.evaluate.also)]
        inputs = inputs._replace(also=tuple(also))
        if second:
            both = (WEIGHT_FILES, TOKENIZER_FILES)
            inputs = inputs._replace(diff=_model_identity(second, both, memory, "evaluate.diff.model.name"))
    if config.published and "train" in stages:
        inputs = inputs._replace(published=_published_identity("published", config.published, memory))
    if "train" in stages and config.train and config.train.start_from:
        inputs = inputs._replace(start=start_identity(config.train.start_from, memory))
    if config.ingest:
        if "harvest" not in stages:
            return inputs
        parts = [[file for path in paths for file in files_within(path)] for paths in ingest_files(config.ingest)]
        return inputs._replace(activations="+".join(memory.files_hash(files) for files in parts if files))
    kinds = {
        "tokenizer": ((TOKENIZER_FILES, CHAT_TEMPLATE_FILES), ("sample", "evaluate", "explain", "benchmark")),
        "model": ((WEIGHT_FILES,), ("harvest", "evaluate", "explain", "benchmark")),
        "generation": (
            (CHAT_TEMPLATE_FILES, GENERATION_FILES),
            ("evaluate", "benchmark") if Path(config.model.name).is_dir() else (),
        ),
    }
    for name, (files, readers) in kinds.items():
        if set(readers) & set(stages):
            inputs = inputs._replace(**{name: _model_identity(config.model, files, memory)})
    if "sample" in stages:
        sources = enumerate(config.sample.sources)
        identities = (_source_identity(f"sample.sources.{i}", source, memory) for i, source in sources)
        inputs = inputs._replace(sources=tuple(identities))
    if "benchmark" in stages and config.benchmark:
        source = task_of(config.benchmark.task, config.benchmark.source).source
        inputs = inputs._replace(task=source and _source_identity("benchmark.source", source, memory))
    return inputs


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
        page = f"datasets/{name}" if kind == "dataset" else name
        raise UserError(
            f"{setting}: {name!r} is gated: accept its terms at https://huggingface.co/{page}, "
            "then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{setting}: {name!r}: neither a local path nor a {kind} on the hub (or one that needs HF_TOKEN)"
        ) from None
    except hub_errors() as error:
        raise UserError(f"{no_answer} ({type(error).__name__})") from None
    if not commit or not COMMIT.fullmatch(commit):
        raise UserError(
            f"{setting}: the hub gives no commit for {name!r} at {branch!r}; set the revision to a full commit hash"
        )
    return commit


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


def _source_identity(setting: str, source: Source, memory: Memory) -> str:
    try:
        if not is_local(source.path):
            return memory.commit("dataset", source.path, source.revision, f"{setting}.path")
        return memory.files_hash(find_files(source, setting).files)
    except UserError as error:
        raise UserError(f"{error}{_setup_hint(source.path)}") from None


def _published_identity(setting: str, published: PublishedFiles, memory: Memory) -> str:
    if published.release is not None and published.id is not None:
        repository, place = release_place(setting, published.release, published.id)
        commit = memory.commit("model", repository, published.revision, f"{setting}.release")
        return f"{commit}/{place}"
    path = str(published.path)
    if not is_local(path):
        commit = memory.commit("model", path, published.revision, f"{setting}.path")
        return f"{commit}/{published.file}" if published.file else commit
    files = [Path(path, name) for name in published.files()]
    for file in files:
        if not file.is_file():
            raise UserError(f"{setting}.path: {path!r}: there is no file {file} (format {published.format})")
    return memory.files_hash(files)


def start_identity(start: StartFrom, memory: Memory) -> str:
    """Content of a given SAE, or of all those of a train directory; its commit on the hub.

    Raises UserError for one that is missing or unfinished.
    """
    if is_on_hub(start):
        return f"{memory.commit('model', start.path, start.revision, 'train.start_from')}/{start.file}".rstrip("/")
    return memory.files_hash(find_start(start).files)


def _setup_hint(name: str) -> str:
    return "; `make setup` puts it there" if name in SETUP else nearest_hint(name, SETUP)
