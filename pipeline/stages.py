"""The stages as records, the fingerprints of their results, and where those lie.

fingerprint = sha256(stage, its version, fingerprint upstream, inputs by content, settings without `runtime`), of
which the first 12 hex digits name the directory. Nothing here imports torch until a stage really runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from evaluate.benchmark_config import BENCHMARK_VERSION
from evaluate.config import EVALUATE_VERSION, EvaluateConfig
from evaluate.explain_config import EXPLAIN_VERSION
from harvest.config import HARVEST_VERSION, SAMPLE_VERSION
from harvest.contexts import SPLITS
from harvest.files import UserError
from harvest.hub import resolved_commit
from harvest.stage_directory import FINGERPRINT, MANIFEST, Run
from pipeline.config import PipelineConfig
from pipeline.fingerprint import EVERY_STAGE, STAGES, Inputs, find_inputs, hashed_settings
from train.config import TRAIN_VERSION, SweepConfig, TrainConfig, exactly
from train.published_config import PLACE, PUBLISHED_VERSION

Begin = Callable[[dict[str, Any]], None]  # called with the numerics before the first byte is written
Summary = dict[str, Any] | None  # None where other workers have shards to write, or problems to answer


class Runs(NamedTuple):
    """One setting of the pipeline, and where its results lie below the root folder."""

    config: PipelineConfig
    inputs: Inputs
    fingerprints: dict[str, str]
    root: Path

    def of(self, stage: str) -> Run:
        """The run of a stage."""
        return Run(self.root / stage / self.fingerprints[stage])

    def directory(self, stage: str) -> Path:
        """Where a stage of these settings writes."""
        return self.of(stage).path

    @property
    def stages(self) -> dict[str, "Stage"]:
        """Those that these settings have, first ones first."""
        return stages_of(self.config)

    def upstreams(self, stage: str) -> list[Run]:
        """The runs that a stage directly depends on."""
        return [self.of(name) for name in self.stages[stage].upstreams]

    def before(self, stage: str) -> dict[str, Run]:
        """The runs of all stages that it depends on, first ones first."""
        found: dict[str, Run] = {}
        for name in self.stages[stage].upstreams:
            found |= self.before(name) | {name: self.of(name)}
        return found

    def identity(self, stage: str) -> dict[str, Any]:
        """What begun.json and the manifest say of a run, but for times and numerics."""
        harvest = self.config.harvest if stage == "harvest" else None
        store = harvest and harvest.runtime.store_at(self.fingerprints[stage])
        return {
            **({"store": store} if store else {}),
            "stage": stage,
            "version": self.stages[stage].version,
            "fingerprint": self.fingerprints[stage],
            "upstreams": [str(run.path) for run in self.upstreams(stage)],
            "settings": self.settings(stage),
            "inputs": self.inputs.known(stage),
        }

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings that a stage's result depends on, with the names of its model and data."""
        settings = self.stages[stage].settings(self.config)
        if self.config.model and stage in ("sample", "harvest"):
            settings["model"] = self.config.model.model_dump()
        return settings


class Job(NamedTuple):
    """One run to be made."""

    runs: Runs
    directory: Path
    begin: Begin
    harvest: AbstractContextManager[Any] | None  # makes the rows of training window by window (pipeline/stream.py)


class Stage(NamedTuple):
    """What a stage's result depends on, and how it is made."""

    name: str
    version: int
    upstreams: tuple[str, ...]
    settings: Callable[[PipelineConfig], dict[str, Any]]
    inputs: Callable[[dict[str, Any], Inputs], Any]  # by content; takes their names out of those settings
    run: Callable[[Sequence[Job]], Iterator[Summary]]


def _sample_inputs(settings: dict[str, Any], inputs: Inputs) -> Any:
    for source, content in zip(settings["sources"], inputs.sources, strict=True):
        del source["path"], source["revision"]
        source["content"] = content
    return inputs.tokenizer


def _given_inputs(settings: dict[str, Any], inputs: Inputs) -> Any:
    del settings["ingest"]["path"], settings["ingest"]["token_ids"]
    return inputs.activations


def _train_inputs(settings: dict[str, Any], inputs: Inputs) -> None:
    if settings.get("start_from"):
        settings["start_from"] = inputs.start


def _evaluate_inputs(settings: dict[str, Any], inputs: Inputs) -> Any:
    for published, content in zip(settings.get("also", ()), inputs.also, strict=True):
        _by_content(published, content)
    if settings.get("diff"):
        settings["diff"]["model"] = None
    return {"diff": inputs.diff, "generation": inputs.generation} if inputs.generation else inputs.diff


def _benchmark_inputs(settings: dict[str, Any], inputs: Inputs) -> Any:
    for name in ("path", "revision"):
        del settings["source"][name]
    return inputs.task


def _published_inputs(settings: dict[str, Any], inputs: Inputs) -> Any:
    _by_content(settings, inputs.published)


def _by_content(published: dict[str, Any], content: str | None) -> None:
    for name in PLACE:
        published.pop(name, None)
    published["content"] = content


def _sample(jobs: Sequence[Job]) -> Iterator[Summary]:
    from harvest import sampling

    for (config, inputs, *_), directory, begin, _ in jobs:
        commit = resolved_commit(inputs.tokenizer)
        yield sampling.run(config.model, commit, config.sample, inputs.sources, directory, begin)


def _harvest(jobs: Sequence[Job], splits: Sequence[str] = SPLITS) -> Iterator[Summary]:
    from harvest import run as harvest

    for runs, directory, begin, _ in jobs:
        config, commit = runs.config, resolved_commit(runs.inputs.model)
        settings = config.model, commit, config.sample, config.harvest
        yield harvest.Harvest(*settings, runs.directory("sample"), directory, begin, splits).run()


def _take_given(jobs: Sequence[Job]) -> Iterator[Summary]:
    from harvest import ingest

    for runs, directory, begin, _ in jobs:
        assert runs.config.ingest
        yield ingest.run(runs.config.ingest, directory, begin)


def _train(jobs: Sequence[Job]) -> Iterator[Summary]:
    """All of a sweep together, as they share one reading of the store."""
    from train import run as train

    tasks = [train.Task(started(job.runs.config.train, job.runs.inputs), job.directory, job.begin) for job in jobs]
    with jobs[0].harvest or nullcontext() as made:
        summaries = train.run(tasks, jobs[0].runs.directory("harvest"), made)
    yield from summaries


def _take_published(jobs: Sequence[Job]) -> Iterator[Summary]:
    from train import published

    for runs, directory, begin, _ in jobs:
        assert runs.config.published
        commit = resolved_commit(runs.inputs.published)
        yield published.run(runs.config.published, commit, runs.directory("harvest"), directory, begin)


def started(train: TrainConfig, inputs: Inputs) -> TrainConfig:
    """The settings with the branch of start_from as the commit that the fingerprint holds."""
    if not train.start_from or not inputs.start:
        return train
    start = train.start_from.model_copy(update={"revision": resolved_commit(inputs.start)})
    return train.model_copy(update={"start_from": start})


def _evaluate(jobs: Sequence[Job]) -> Iterator[Summary]:
    from evaluate import run as evaluate

    for runs, directory, begin, _ in jobs:
        config, inputs = runs.config, runs.inputs
        also = [resolved_commit(identity) for identity in inputs.also]
        settings, commit = _resolved(config.evaluate, inputs), resolved_commit(inputs.model)
        yield evaluate.run(config.model, commit, settings, also, runs.before("evaluate"), directory, begin)


def _explain(jobs: Sequence[Job]) -> Iterator[Summary]:
    from evaluate import explain

    for runs, directory, begin, _ in jobs:
        config, inputs = runs.config, runs.inputs
        assert config.explain
        settings, commit = (_resolved(config.evaluate, inputs), config.explain), resolved_commit(inputs.model)
        yield explain.run(config.model, commit, *settings, runs.before("explain"), directory, begin)


def _benchmark(jobs: Sequence[Job]) -> Iterator[Summary]:
    from evaluate import benchmark

    for runs, directory, begin, _ in jobs:
        config, inputs = runs.config, runs.inputs
        assert config.benchmark
        commits, settings = (resolved_commit(inputs.model), resolved_commit(inputs.task)), config.evaluate
        before = runs.before("benchmark")
        yield benchmark.run(config.model, *commits, settings, config.benchmark, before, directory, begin)


def _resolved(config: EvaluateConfig, inputs: Inputs) -> EvaluateConfig:
    """The settings with the second model's branch as the commit that the fingerprint holds."""
    if not config.diff or not config.diff.model or not inputs.diff:
        return config
    model = config.diff.model.model_copy(update={"revision": resolved_commit(inputs.diff)})
    return config.model_copy(update={"diff": config.diff.model_copy(update={"model": model})})


def _section(name: str) -> Callable[[PipelineConfig], dict[str, Any]]:
    return lambda config: hashed_settings(getattr(config, name))


def _given(config: PipelineConfig) -> dict[str, Any]:
    return {"ingest": _section("ingest")(config)}


def _heldout(config: PipelineConfig) -> dict[str, Any]:
    """Those of the harvest for an SAE that is there: training rows, which nothing reads, are not made."""
    return {**_section("harvest")(config), "splits": ["holdout"]}


SAMPLE = Stage("sample", SAMPLE_VERSION, (), _section("sample"), _sample_inputs, _sample)
HARVEST = Stage("harvest", HARVEST_VERSION, ("sample",), _section("harvest"), lambda _, i: i.model, _harvest)
HELDOUT = HARVEST._replace(settings=_heldout, run=partial(_harvest, splits=("holdout",)))
GIVEN = Stage("harvest", HARVEST_VERSION, (), _given, _given_inputs, _take_given)
TRAIN = Stage("train", TRAIN_VERSION, ("harvest",), _section("train"), _train_inputs, _train)
PUBLISHED = Stage("train", PUBLISHED_VERSION, ("harvest",), _section("published"), _published_inputs, _take_published)
EVALUATE = Stage("evaluate", EVALUATE_VERSION, ("train",), _section("evaluate"), _evaluate_inputs, _evaluate)
EXPLAIN = Stage("explain", EXPLAIN_VERSION, ("evaluate",), _section("explain"), lambda _s, _i: None, _explain)
BENCHMARK = Stage("benchmark", BENCHMARK_VERSION, ("evaluate",), _section("benchmark"), _benchmark_inputs, _benchmark)


def stages_of(config: PipelineConfig) -> dict[str, Stage]:
    """The stages of these settings, first ones first: given activations are another kind of harvest, without text; a
    published SAE is another kind of training, for which held-out rows are harvested; explain and benchmark come last,
    if at all."""
    first = (GIVEN,) if config.ingest else (SAMPLE, HELDOUT if config.published else HARVEST)
    last = (*([EXPLAIN] if config.explain else ()), *([BENCHMARK] if config.benchmark else ()))
    return {stage.name: stage for stage in (*first, PUBLISHED if config.published else TRAIN, EVALUATE, *last)}


def fingerprints(config: PipelineConfig, inputs: Inputs) -> dict[str, str]:
    """The fingerprint of every stage that these settings have."""
    out: dict[str, str] = {}
    for name, stage in stages_of(config).items():
        settings = stage.settings(config)
        content = stage.inputs(settings, inputs)
        upstreams = [out[upstream] for upstream in stage.upstreams]
        upstream = upstreams if len(upstreams) > 1 else upstreams[0] if upstreams else None
        document = json.dumps([name, stage.version, upstream, content, settings], sort_keys=True)
        out[name] = hashlib.sha256(document.encode()).hexdigest()[:12]
    return out


def explained(runs: Runs) -> list[Run]:
    """The complete explanations of an evaluation, the newest first; of these settings alone where they have them."""
    if "explain" in runs.stages:
        return [run for run in [runs.of("explain")] if run.is_complete]
    return made_on(runs.of("evaluate"), "explain")


def made_later(evaluated: Run) -> list[Run]:
    """All complete explanations and benchmarks of an evaluation, under any settings."""
    return [run for stage in EVERY_STAGE[len(STAGES) :] for run in made_on(evaluated, stage)]


def made_on(evaluated: Run, stage: str) -> list[Run]:
    """All complete runs of a later stage on an evaluation, the newest first."""
    made = sorted(evaluated.path.parents[1].glob(f"{stage}/*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    found = []
    for run in (Run(path.parent) for path in made if FINGERPRINT.fullmatch(path.parent.name)):
        with suppress(UserError):  # of a damaged manifest
            found += [run] if run.upstreams[0].path.name == evaluated.path.name else []
    return found


def find_runs(config: PipelineConfig, root: Path) -> list[Runs]:
    """Identify inputs and fingerprints, of every single setting of a sweep.

    See `find_inputs` for what it raises.
    """
    inputs = find_inputs(config, root)
    single = [config]
    if config.train:
        single = [config.model_copy(update={"train": train}) for train in config.train.expanded()]
    return [Runs(c, inputs, fingerprints(c, inputs), root) for c in single]


def swept(runs: Runs, sweep: Sequence[Runs], between: str = " ", equals: str = "=") -> str:
    """What sets a run apart from the others of its sweep, as `kind=topk k=16`; empty without a sweep."""
    if len(sweep) == 1:
        return ""

    def values(name: str, of: Sequence[Runs]) -> list[Any]:
        sections = [each.config.train if name == "lr" else each.config.train.sae for each in of]
        return [getattr(section, name) for section in sections]

    apart = [name for name in SweepConfig.model_fields if len({*values(name, sweep)} - {None}) > 1]
    mine = {name: values(name, [runs])[0] for name in apart}  # None for what its kind does not have
    return between.join(f"{name}{equals}{exactly(value)}" for name, value in mine.items() if value is not None)
