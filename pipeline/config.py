"""Settings files: YAML plus `section.key=value` overrides, checked against the stages' settings.

An error names the file and line (or the command line), the setting, the value and the way out.
"""

import difflib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator

from evaluate.config import EvaluateConfig
from harvest.config import HarvestConfig, IngestConfig, ModelConfig, SampleConfig, Settings
from pipeline.settings_text import Loaded, SettingsError, given_twice, override, read
from train.config import TrainConfig

__all__ = ["IngestedConfig", "PipelineConfig", "SettingsError", "given_twice", "load"]


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
        self.train.batches(sample.shards("train") * sample.shard_rows)
        self.train.exclude.check_positions(sample.context_size)
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
        if self.ingest.context_size:
            self.train.exclude.check_positions(self.ingest.context_size)
        return self


def load(path: Path, overrides: list[str]) -> PipelineConfig | IngestedConfig:
    """The settings of a file with overrides applied; a section `ingest` makes them those of given activations.

    Raises SettingsError, one line for each thing that is wrong.
    """
    loaded = read(path, list(PipelineConfig.model_fields))
    for text in overrides:
        override(loaded, text)
    return _validated(IngestedConfig if "ingest" in loaded.values else PipelineConfig, loaded, path)


def _validated(
    kind: type[PipelineConfig | IngestedConfig], loaded: Loaded, path: Path
) -> PipelineConfig | IngestedConfig:
    try:
        return kind.model_validate(loaded.values)
    except ValidationError as error:
        texts = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "string_type"]
        if loaded.take_as_written(texts):
            return _validated(kind, loaded, path)
        raise SettingsError("\n".join(_explain(e, loaded, path, kind) for e in error.errors())) from None


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
