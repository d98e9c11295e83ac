"""What a stage's result depends on, as 12 hex digits.

fingerprint = sha256(stage, its version, upstream fingerprint, inputs by content, settings without
`runtime`). Local models and data enter by content, hub ones by commit; neither by path.
"""

import difflib
import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from evaluate.config import EVALUATE_VERSION, PublishedSae
from harvest.config import HARVEST_VERSION, SAMPLE_VERSION, ModelConfig, Settings, Source
from harvest.files import UserError, read_json, write_json
from harvest.hub import hub_answers
from harvest.progress import Progress
from harvest.sources import files_within, hub_errors, ingest_files, local_files, looks_local
from pipeline import assets
from pipeline.config import IngestedConfig, PipelineConfig
from train.config import TRAIN_VERSION

STAGES = ("sample", "harvest", "train", "evaluate")
VERSIONS: dict[str, int] = dict(
    zip(STAGES, (SAMPLE_VERSION, HARVEST_VERSION, TRAIN_VERSION, EVALUATE_VERSION), strict=True)
)
TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges)\.(json|txt|model)")
WEIGHT_FILES = re.compile(r"config\.json|.*\.safetensors|.*\.safetensors\.index\.json")
SLOW_BYTES = 10 << 30  # hashing more shows its progress
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

    def known(self, stage: str) -> dict[str, Any]:
        """Those that there are; the SAEs of others and a second model concern evaluate alone."""
        of_others = () if stage == "evaluate" else ("also", "diff")
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
    parts["evaluate"] = (_without_name(evaluate), inputs.diff)
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
    memory = _Memory(runs / ".inputs.json")
    also = tuple(_published_identity(i, published, memory) for i, published in enumerate(config.evaluate.also))
    second = config.evaluate.diff.model if config.evaluate.diff else None
    identity = _model_identity(second, WEIGHT_FILES, memory, "evaluate.diff.model.name") if second else None
    if isinstance(config, IngestedConfig):
        parts = [[file for path in paths for file in files_within(path)] for paths in ingest_files(config.ingest)]
        hashes = [memory.files_hash(files) for files in parts if files]
        memory.save()
        return Inputs(None, None, (), "+".join(hashes), also, identity)
    inputs = Inputs(
        _model_identity(config.model, TOKENIZER_FILES, memory),
        _model_identity(config.model, WEIGHT_FILES, memory),
        tuple(_source_identity(i, source, memory) for i, source in enumerate(config.sample.sources)),
        also=also,
        diff=identity,
    )
    memory.save()
    return inputs


def resolved_commit(identity: str | None) -> str | None:
    """The commit of a hub identity; None for local content."""
    return identity.rpartition("@")[2].partition("/")[0] if identity and identity.startswith("hub:") else None


class _Memory:
    """Content hashes by path, size and mtime; hub commits by name and branch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known = read_json(path)
        except UserError:
            self.known = {}  # a cache: what is lost is computed again
        self.changed = False

    def save(self) -> None:
        if self.changed:
            with suppress(OSError):  # a folder of runs may be looked at where it cannot be written
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self.known)

    def get(self, key: str, make: Any) -> str:
        if not isinstance(self.known.get(key), str):
            self.known[key] = make()
            self.changed = True
        return self.known[key]

    def file_hash(self, path: Path) -> str:
        stat = path.stat()

        def digest() -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self.get(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}", digest)

    def files_hash(self, files: list[Path]) -> str:
        size = sum(path.stat().st_size for path in files)
        hashes = []
        with Progress("content of files", size, "bytes", quiet=size < SLOW_BYTES) as progress:
            try:
                for path in files:
                    hashes.append([path.name, self.file_hash(path)])
                    progress.advance(path.stat().st_size)
            except KeyboardInterrupt:
                self.save()  # terabytes take hours; what is known stays known
                raise
        return "sha256:" + hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def commit(self, kind: str, name: str, revision: str | None, setting: str) -> str:
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


def _model_identity(model: ModelConfig, files: re.Pattern[str], memory: _Memory, setting: str = "model.name") -> str:
    folder = Path(model.name)
    if not folder.is_dir():
        if looks_local(model.name):
            raise UserError(f"{setting}: {model.name!r}: no such folder{_setup_hint(model.name)}")
        return memory.commit("model", model.name, model.revision, setting)
    found = sorted(path for path in folder.iterdir() if files.fullmatch(path.name))
    if not (folder / "config.json").exists() or not found:
        raise UserError(
            f"{setting}: {model.name!r}: needs config.json, *.safetensors and tokenizer files; "
            f"nothing there matches {files.pattern!r}"
        )
    return memory.files_hash(found)


def _source_identity(i: int, source: Source, memory: _Memory) -> str:
    files = local_files(source.path)
    if files:
        return memory.files_hash(files)
    if looks_local(source.path):
        if Path(source.path).is_file():
            raise UserError(
                f"sample.sources.{i}.path: {source.path!r}: neither .jsonl, .json nor .parquet; plain text goes into a "
                '.jsonl file, one {"text": "..."} a line, with rows: text'
            )
        raise UserError(
            f"sample.sources.{i}.path: {source.path!r}: no .jsonl, .json or .parquet file there"
            f"{_setup_hint(source.path)}"
        )
    return memory.commit("dataset", source.path, source.revision, f"sample.sources.{i}.path")


def _published_identity(i: int, published: PublishedSae, memory: _Memory) -> str:
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
    if name in SETUP:
        return "; `make setup` puts it there"
    if not name or Path(name).exists():
        return ""
    beside = [str(path) for path in Path(name).parent.glob("*")]
    close = difflib.get_close_matches(name, [*SETUP, *beside], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
