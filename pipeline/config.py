"""Settings files: YAML plus `section.key=value` overrides, checked against the stages' settings.

An error names the file and line (or the command line), the setting, the value and the way out.
"""

import difflib
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from evaluate.benchmark_config import BenchmarkConfig
from evaluate.config import EvaluateConfig
from evaluate.explain_config import ExplainConfig
from harvest.config import HarvestConfig, IngestConfig, ModelConfig, SampleConfig, Settings
from pipeline.settings_text import COMMAND_LINE, Loaded, SettingsError, override, read
from train.config import HYPERPARAMETERS, KINDS, ExcludeConfig, TrainConfig, exactly
from train.published_config import PublishedConfig

ABSENT: Any = None
OF_TEXT = ("model", "sample", "harvest")  # sections whose place `ingest` takes
FOLLOWS = "default_factory_not_called"  # pydantic says this of defaults, beside what is wrong


class PipelineConfig(Settings):
    """A settings file: a model and its text, or activations that are given (`ingest`); an SAE to train, or one that is
    there (`published`)."""

    # Beside `ingest` these three are None; `load` makes sure that they are set otherwise.
    model: ModelConfig = Field(default=ABSENT)
    sample: SampleConfig = Field(default=ABSENT)
    harvest: HarvestConfig = Field(default=ABSENT)
    ingest: IngestConfig | None = None
    train: TrainConfig = Field(default=ABSENT)  # None beside `published`
    published: PublishedConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    explain: ExplainConfig | None = None  # `make explain` alone runs it
    benchmark: BenchmarkConfig | None = None  # `make benchmark` alone runs it

    @model_validator(mode="after")
    def _check(self) -> "PipelineConfig":
        if self.explain and self.ingest:
            raise ValueError("explain: ingested activations have no text to explain; take this section out")
        if self.benchmark and self.ingest:
            raise ValueError("benchmark: ingested activations have no model to answer; take this section out")
        if self.explain and not self.evaluate.features:
            raise ValueError("evaluate.features: null: explain reads what it writes; leave evaluate.features as it is")
        if self.ingest:
            section, chunk_rows, context_size = "ingest", self.ingest.chunk_rows, self.ingest.context_size
        else:
            section, chunk_rows, context_size = "harvest", self.harvest.chunk_rows, self.sample.context_size
            self._check_text(self.sample, self.harvest)
        if self.train and self.train.pool_rows < chunk_rows:
            raise ValueError(
                f"train.pool_rows: {self.train.pool_rows}: must hold at least one chunk of "
                f"{section}.chunk_rows = {chunk_rows}"
            )
        if context_size:
            self.exclude.check_positions(context_size)
        if self.published and self.evaluate.sae == "best":
            raise ValueError("evaluate.sae: 'best': a published SAE is one; take this setting out")
        return self

    @property
    def exclude(self) -> ExcludeConfig:
        """The rows that training, or what stands in its place, leaves out."""
        return self.published.exclude if self.published else self.train.exclude

    def _check_text(self, sample: SampleConfig, harvest: HarvestConfig) -> None:
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
        if self.benchmark and self.benchmark.hook not in (None, *harvest.hooks):
            known = ", ".join(harvest.hooks)
            raise ValueError(f"benchmark.hook: {self.benchmark.hook!r}: no such hook; one of {known}")
        if self.published and len(harvest.hooks) > 1:
            raise ValueError(f"harvest.hooks: {', '.join(harvest.hooks)}: published is one SAE, of one of them")
        if self.train:
            if not sample.shards("train"):
                raise ValueError("sample.train_tokens: 0: leaves nothing to train on; it goes with `published` alone")
            self.train.batches(sample.shards("train") * sample.shard_rows)
        known = [source.name for source in sample.sources]
        for setting in ("reason_score", "diff"):
            section = getattr(self.evaluate, setting)
            for name in (section and section.sources) or ():
                if name not in known:  # evaluation would look for it in vain, after hours of work
                    raise ValueError(f"evaluate.{setting}.sources: {name!r}: no such source; one of {', '.join(known)}")
        injection, score = self.evaluate.token_injection, self.evaluate.reason_score
        read = (score.sources or known) if score else ()
        for name in (injection and injection.into) or ():
            if name not in known or name in read:
                why = "reason_score reads it, and tokens go into other text" if name in read else "no such source"
                others = ", ".join(source for source in known if source not in read) or "none, as it reads all"
                raise ValueError(f"evaluate.token_injection.into: {name!r}: {why}; possible: {others}")


def load(path: Path, overrides: list[str]) -> PipelineConfig:
    """The settings of a file with overrides applied.

    Raises SettingsError, one line for each thing that is wrong.
    """
    loaded = read(path, [*OF_TEXT, "train", "evaluate"])
    for text in overrides:
        override(loaded, text)
    if aside := take_aside(loaded):
        print(f"note: {path}: set aside, as {aside}", file=sys.stderr, flush=True)
    for name in ("train", "published"):  # null takes a section away
        if loaded.values.get(name, "") is None:
            del loaded.values[name]
    wrong = []
    for names, other, why in (
        (OF_TEXT, "ingest", "whose activations need no text and no model"),
        (("train",), "published", "an SAE that is there and needs no training"),
    ):
        given = loaded.values.get(other) is not None
        wrong += [
            _wrong_section(name, loaded, path, given and f"{other}, {why}")
            for name in names
            if given == (name in loaded.values)
        ]
    if wrong:
        raise SettingsError("\n".join(wrong))
    return _validated(loaded, path)


def take_aside(loaded: Loaded) -> str:
    """Take out the file's settings of kinds of SAE that the command line's kind is none of; what was, and why."""
    train = loaded.values.get("train")
    sections = {name: of for name in ("sae", "sweep") if isinstance(of := (train or {}).get(name), dict)}
    chosen = [f"train.{n}.kind" for n in sections if loaded.places.get(f"train.{n}.kind") == COMMAND_LINE]
    if not chosen:
        return ""
    by = chosen[-1]  # a sweep's kinds stand in the place of the one kind
    given = sections[by.split(".")[1]]["kind"]
    kinds = [given] if isinstance(given, str) else given or ()
    if not all(isinstance(kind, str) and kind in KINDS for kind in kinds):
        return ""  # an error, which names what is known
    own = {name for kind in kinds for name in KINDS[kind].hyperparameters}
    found = []
    for section, values in sections.items():
        others = [name for name in HYPERPARAMETERS if name not in own]
        for name in [*others, *(["kind"] if section == "sweep" else [])]:
            place = f"train.{section}.{name}"
            if values.get(name) is not None and loaded.places.get(place) != COMMAND_LINE:
                found.append(f"{place} = {exactly(values.pop(name))}")
    return f"{by}={given}: {', '.join(found)}".replace("'", "") if found else ""


def _wrong_section(name: str, loaded: Loaded, path: Path, beside: str | Literal[False]) -> str:
    if not beside:
        return f"{path}: {name}: this setting is required"
    return f"{loaded.places.get(name, path)}: {name}: not together with {beside}; take one of them out"


def _validated(loaded: Loaded, path: Path) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(loaded.values)
    except ValidationError as error:
        texts = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "string_type"]
        if loaded.take_as_written(texts):
            return _validated(loaded, path)
        own = [e for e in error.errors() if e["type"] != FOLLOWS]
        raise SettingsError("\n".join(_explain(e, loaded, path) for e in own)) from None


def _explain(error: Any, loaded: Loaded, path: Path) -> str:
    location = [str(part) for part in error["loc"]]
    name, kind, value = ".".join(location), error["type"], error["input"]
    parents = (".".join(location[:end]) for end in range(len(location), 0, -1))
    place = next((loaded.places[parent] for parent in parents if parent in loaded.places), path)
    where = f"{place}: {name}: " if name else f"{path}: "
    if kind == "extra_forbidden":
        known = list(_section_at(location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}unknown setting; {hint}"
    if kind == "missing":
        return f"{where}this setting is required"
    if kind == "model_type":
        return f"{where}{value!r}: this is a section, with {', '.join(_section_at(location).model_fields)}"
    if kind == "string_pattern_mismatch":
        about = _section_at(location[:-1]).model_fields[location[-1]].description or ""
        return f"{where}{value!r}: not of the form that it has: {' '.join(about.split())}"
    if kind == "tuple_type":
        return f"{where}{value!r}: input should be a list, as [{value}]"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{where}{message}" if isinstance(value, dict | BaseModel) else f"{where}{value!r}: {message}"


def _section_at(location: list[str]) -> type[BaseModel]:
    section: Any = PipelineConfig
    for part in location:
        if part.isdigit():
            continue
        section = section.model_fields[part].annotation
        while get_args(section):  # X | None, tuple[X, ...]
            section = next(a for a in get_args(section) if isinstance(a, type) and issubclass(a, BaseModel))
    return section
