"""Settings files: YAML plus `section.key=value` overrides, checked against the stages' settings.

An error names the file and line (or the command line), the setting, the value and the way out.
"""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from evaluate.config import EvaluateConfig
from harvest.config import HarvestConfig, IngestConfig, ModelConfig, SampleConfig, Settings
from train.config import TrainConfig

MAX_SETTINGS_BYTES = 1 << 20  # a settings file is a page; a larger one is some other file
QUOTES = "a value with spaces takes quotes within SET: SET=\"train.sweep.l1_coefficient='[3, 5]'\""


class SettingsError(ValueError):
    """A settings file or override that cannot be used; the text is for the user."""


class PipelineConfig(Settings):
    """A settings file with a model and text."""

    model: ModelConfig
    sample: SampleConfig
    harvest: HarvestConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check(self) -> "PipelineConfig":
        sample, harvest = self.sample, self.harvest
        if sample.shard_contexts % harvest.batch_contexts:
            raise ValueError(
                f"harvest.batch_contexts: {harvest.batch_contexts}: must divide sample.shard_contexts = "
                f"{sample.shard_contexts}, as every forward pass takes whole batches of one shard"
            )
        if sample.shard_rows % harvest.chunk_rows:
            raise ValueError(
                f"harvest.chunk_rows: {harvest.chunk_rows}: must divide the rows of a shard, "
                f"sample.shard_contexts x context_size = {sample.shard_rows}"
            )
        if self.train.pool_rows < harvest.chunk_rows:
            raise ValueError(
                f"train.pool_rows: {self.train.pool_rows}: must hold at least one chunk of "
                f"harvest.chunk_rows = {harvest.chunk_rows}"
            )
        _check_evaluation(self.evaluate, sample)
        return self


def _check_evaluation(evaluate: EvaluateConfig, sample: SampleConfig) -> None:
    """Sources that evaluation would look for in vain, said before hours of work."""
    score, diff = evaluate.reason_score, evaluate.diff
    known = [source.name for source in sample.sources]
    for setting, names in (("reason_score", score and score.sources), ("diff", diff and diff.sources)):
        for name in names or ():
            if name not in known:
                raise ValueError(f"evaluate.{setting}.sources: {name!r}: no such source; one of {', '.join(known)}")


class IngestedConfig(Settings):
    """Settings for activations that are there already: without text, without a model."""

    ingest: IngestConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check(self) -> "IngestedConfig":
        if self.train.pool_rows < self.ingest.chunk_rows:
            raise ValueError(
                f"train.pool_rows: {self.train.pool_rows}: must hold at least one chunk of "
                f"ingest.chunk_rows = {self.ingest.chunk_rows}"
            )
        return self


class Loaded(NamedTuple):
    """Nested plain values, and where each dotted path stands ("configs/x.yaml:7")."""

    values: dict[str, Any]
    places: dict[str, str]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML reads 1e-4 as a string (it asks for 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load(path: Path, overrides: list[str]) -> PipelineConfig | IngestedConfig:
    """The settings of a file with overrides applied; a section `ingest` makes them those of given activations.

    Raises SettingsError, one line for each thing that is wrong.
    """
    loaded = _read(path)
    for override in overrides:
        _override(loaded, override)
    kind = IngestedConfig if "ingest" in loaded.values else PipelineConfig
    try:
        return kind.model_validate(loaded.values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(e, loaded, path, kind) for e in error.errors())) from None


def _read(path: Path) -> Loaded:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the settings file: {error.strerror}") from None
    if len(raw) > MAX_SETTINGS_BYTES:
        raise SettingsError(f"{path}: larger than {MAX_SETTINGS_BYTES} bytes; is it a settings file?")
    try:
        text = raw.decode()
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[str, str] = {}
        if not isinstance(node, yaml.MappingNode):
            raise SettingsError(f"{path}: no settings in it; it needs {', '.join(PipelineConfig.model_fields)}")
        _note_places(node, "", path, places)
        values = loader.construct_document(node)
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8 text; is it a settings file?") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply or refers to itself") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise SettingsError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    return Loaded(values, places)


def _note_places(node: yaml.Node, prefix: str, path: Path, places: dict[str, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            place = f"{path}:{key.start_mark.line + 1}"
            if name in seen:
                raise SettingsError(f"{place}: {name}: set twice")
            seen.add(name)
            places[name] = place
            _note_places(value, f"{name}.", path, places)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            places[f"{prefix}{i}"] = f"{path}:{value.start_mark.line + 1}"
            _note_places(value, f"{prefix}{i}.", path, places)


def _override(loaded: Loaded, override: str) -> None:
    """Set one dotted path; `sample.sources.0.share=0.3` reaches into a list."""
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
        raise SettingsError(f"{override!r}: an override is section.key=value, as train.sae.l1_coefficient=4; {QUOTES}")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SettingsError(f"{override}: the value is not valid YAML; {QUOTES}") from None
    target: Any = loaded.values
    *path, last = name.split(".")
    for part in path:
        if isinstance(target, list):
            target = target[int(part)] if part.isdigit() and int(part) < len(target) else None
        elif isinstance(target, dict):
            if target.get(part) is None:  # an absent section, or one that stands there empty
                target[part] = {}
            target = target[part]
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise SettingsError(f"{override}: there is no {name} to set")
    for place in [p for p in loaded.places if p.startswith(f"{name}.")]:
        del loaded.places[place]
    loaded.places[name] = "command line"


def _explain(error: Any, loaded: Loaded, path: Path, kind: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    place = loaded.places.get(name)
    parent = location
    while place is None and parent:
        parent = parent[:-1]
        place = loaded.places.get(".".join(parent))
    where = f"{place or path}: {name}: " if name else f"{path}: "
    if error["type"] == "extra_forbidden":
        if kind is IngestedConfig and name in PipelineConfig.model_fields:
            return f"{where}not together with ingest, whose activations need no text and no model; take one of them out"
        known = _fields_at(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}unknown setting; {hint}"
    if error["type"] == "missing":
        return f"{where}this setting is required"
    if error["type"] == "model_type":
        return f"{where}{error['input']!r}: this is a section, with {', '.join(_fields_at(kind, location))}"
    if error["type"] == "string_pattern_mismatch":
        about = " ".join((_section_at(kind, location[:-1]).model_fields[location[-1]].description or "").split())
        return f"{where}{error['input']!r}: not of the form that it has: {about}"
    if error["type"] == "tuple_type":
        return f"{where}{error['input']!r}: input should be a list, as [{error['input']}]"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(error["input"], dict | BaseModel):
        return f"{where}{message}"
    return f"{where}{error['input']!r}: {message}"


def _fields_at(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the settings in the section at this place."""
    return list(_section_at(kind, location).model_fields)


def _section_at(kind: type[BaseModel], location: list[str]) -> type[BaseModel]:
    section: Any = kind
    for part in location:
        if part.isdigit():
            continue
        section = section.model_fields[part].annotation
        while get_args(section):  # X | None, tuple[X, ...]
            section = next(a for a in get_args(section) if isinstance(a, type) and issubclass(a, BaseModel))
    return section
