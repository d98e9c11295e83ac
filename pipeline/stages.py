"""The four stages: where each writes, whether it is complete, why it would run, and running it.

Nothing here imports torch until a stage really runs.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple

from typing_extensions import TypeVar

from evaluate.config import EvaluateConfig
from harvest.files import UserError, locked
from harvest.hub import resolved_commit
from harvest.workers import Workers
from pipeline.config import IngestedConfig, PipelineConfig
from pipeline.fingerprint import (
    STAGES,
    VERSIONS,
    Inputs,
    find_inputs,
    fingerprints,
    hashed_settings,
)
from pipeline.inventory import changed_files
from pipeline.manifest import (
    BEGUN,
    MANIFEST,
    STARTS_OVER,
    DamagedManifestError,
    begin,
    check_files,
    finish,
    is_complete,
    join,
    read_manifest,
    remote_store,
    said,
)
from pipeline.summary import summary_table
from pipeline.watch import Watch

TRASH = ".trash-"
Begin = Callable[[dict[str, Any]], None]  # called with the numerics before the first byte is written


# Bare `Runs` are those of a model and its text; `AnyRuns` may be of activations that were given.
Config = TypeVar("Config", bound=PipelineConfig | IngestedConfig, default=PipelineConfig, covariant=True)


class Runs(NamedTuple, Generic[Config]):
    """One setting of the pipeline, and where its results stand under the root folder."""

    config: Config
    inputs: Inputs
    fingerprints: dict[str, str]
    root: Path

    def directory(self, stage: str) -> Path:
        """Where a stage of these settings writes."""
        return self.root / stage / self.fingerprints[stage]

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that these settings have: activations that are given need no sample."""
        return tuple(self.fingerprints)

    def upstream(self, stage: str) -> str | None:
        """The stage before, None for the first."""
        index = self.stages.index(stage)
        return self.stages[index - 1] if index else None

    def identity(self, stage: str) -> dict[str, Any]:
        """What begun.json and the manifest say of a directory, but for times and numerics."""
        upstream = self.upstream(stage)
        store = None
        if isinstance(self.config, PipelineConfig) and stage == "harvest":
            store = self.config.harvest.runtime.store_at(self.fingerprints[stage])
        return {
            **({"store": store} if store else {}),
            "stage": stage,
            "version": VERSIONS[stage],
            "fingerprint": self.fingerprints[stage],
            "upstream": str(self.directory(upstream)) if upstream else None,
            "settings": self.settings(stage),
            "inputs": self.inputs.known(stage),
        }

    def settings(self, stage: str) -> dict[str, Any]:
        """What of the settings a stage's result depends on, as its fingerprint hashes them."""
        if isinstance(self.config, IngestedConfig) and stage == "harvest":
            return {"ingest": hashed_settings(self.config.ingest)}
        settings = hashed_settings(getattr(self.config, stage))
        if isinstance(self.config, PipelineConfig) and stage in ("sample", "harvest"):
            settings["model"] = self.config.model.model_dump()
        return settings


AnyRuns = Runs[PipelineConfig | IngestedConfig]


def swept(runs: AnyRuns, sweep: Sequence[AnyRuns], between: str = " ", equals: str = "=") -> str:
    """What sets a run apart from the others of its sweep, as `l1_coefficient=5`; empty without a sweep."""

    def values(each: AnyRuns) -> dict[str, float | int | None]:
        train = each.config.train
        return {"l1_coefficient": train.sae.l1_coefficient, "lr": train.lr, "d_sae": train.sae.d_sae}

    mine, all_values = values(runs), [values(each) for each in sweep]
    apart = [name for name in mine if len({each[name] for each in all_values}) > 1]
    return between.join(f"{name}{equals}{_exactly(mine[name])}" for name in apart)


def _exactly(value: float | int | None) -> str:
    """A number in as few digits as tell it apart."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if value is None or float(short) == value else repr(value)


def find_runs(config: Config, root: Path) -> list[Runs[Config]]:
    """Identify inputs and fingerprints, of every single setting of a sweep.

    See `find_inputs` for what it raises.
    """
    inputs = find_inputs(config, root)
    single = [config.model_copy(update={"train": train}) for train in config.train.expanded()]
    return [Runs(c, inputs, fingerprints(c, inputs), root) for c in single]


def run_stage(
    sweep: Sequence[AnyRuns],
    stage: str,
    *,
    allow_mixed: bool,
    force: bool,
    confirm: Callable[[str], bool],
    harvest: AbstractContextManager[Any] | None = None,
) -> None:
    """Run a stage for every setting of a sweep unless it is complete; resume it where it was left.

    `harvest` makes the rows of training window by window (pipeline/stream.py), in place of a harvest that is complete.
    Raises UserError when the stage before is not complete, another process runs this one, or the numerics have changed.
    """
    if stage not in sweep[0].stages:
        print(f"{stage:9} not needed: these settings take activations that are there (ingest)", flush=True)
        return
    todo: dict[Path, AnyRuns] = {}
    for directory, runs in {runs.directory(stage): runs for runs in sweep}.items():
        if not force and _is_whole(directory, stage):
            if not _is_follower():
                print(f"{stage:9} complete  {directory}", flush=True)
            continue
        _check_upstream(runs, stage, streamed=harvest is not None)
        todo[directory] = runs
    if not todo:
        return
    _check_processes(sweep[0].config, stage, force)
    if not _is_follower():
        from pipeline.settings_check import check_before

        known = [runs.fingerprints["evaluate"] for runs in sweep]
        check_before(stage, [runs.config for runs in sweep], known, sweep[0].inputs, sweep[0].directory)
    watch = Watch(sweep[0].config, sweep[0].inputs, sweep[0].root, stage)
    if _is_follower():
        _beside_rank_0(todo, stage, watch, allow_mixed, harvest)
        return
    with ExitStack() as stack:
        begins = []
        for directory, runs in todo.items():
            stack.enter_context(_lock(directory, stage, force))
            if force and (directory / BEGUN).exists():
                _clear(directory, confirm)
            (directory / MANIFEST).unlink(missing_ok=True)  # of an evaluation that is not whole
            _empty_trash(directory)
            verb = "resumes" if (directory / BEGUN).exists() else "runs"
            print(f"{stage:9} {verb}  {directory}", flush=True)
            begins.append(watched(watch, partial(begin, directory, runs.identity(stage), allow_mixed=allow_mixed)))
        summaries = _run(stage, list(todo.values()), begins, harvest)
        for directory, summary in zip(todo, summaries, strict=True):
            if summary is not None:  # else other workers have shards to write
                _finish(stage, directory, summary, watch)


def _finish(stage: str, directory: Path, summary: dict[str, Any], watch: Watch) -> None:
    watch.check_unchanged()
    finish(directory, summary)
    print(summary_table(stage, summary), flush=True)
    print(f"{stage:9} complete  {directory}", flush=True)


def _is_whole(directory: Path, stage: str) -> bool:
    """Whether a stage is complete, and what it left is there; an evaluation that is not whole is to be made anew.

    Raises UserError that names a missing or changed file of another stage, which would take hours.
    """
    if not is_complete(directory):
        return False
    if stage not in STARTS_OVER:
        check_files(directory, read=False)
        return True
    try:
        changed = changed_files(directory, read_manifest(directory))
        reason = said(directory, changed) if changed else ""
    except DamagedManifestError as error:
        reason = str(error)
    if reason:
        print(f"{stage:9} is made anew: {reason}", flush=True)
    return not reason


def watched(watch: Watch, begin_run: Begin) -> Begin:
    """What begins a run, once the files that it reads were found to be those of its fingerprint."""

    def begin_watched(numerics: dict[str, Any]) -> None:
        watch.check()
        begin_run(numerics)

    return begin_watched


def _beside_rank_0(
    todo: dict[Path, AnyRuns],
    stage: str,
    watch: Watch,
    allow_mixed: bool,
    harvest: AbstractContextManager[Any] | None,
) -> None:
    """This process's part of a stage, beside rank 0, which begins it and speaks; who ends a harvest finishes it."""
    begins: list[Begin] = [_ignore] * len(todo)  # in training, rank 0 compares the numerics
    with ExitStack() as stack:
        if stage == "harvest":
            for directory in todo:
                stack.enter_context(_lock(directory, stage, force=False))
            configs = {directory: runs.config for directory, runs in todo.items()}
            harvests = {d: config.harvest for d, config in configs.items() if isinstance(config, PipelineConfig)}
            begins = [
                watched(watch, partial(join, directory, allow_mixed=allow_mixed, seconds=harvest.runtime.wait_seconds))
                for directory, harvest in harvests.items()
            ]
        for directory, summary in zip(todo, _run(stage, list(todo.values()), begins, harvest), strict=True):
            if stage == "harvest" and summary is not None:
                _finish(stage, directory, summary, watch)


def _lock(directory: Path, stage: str, force: bool) -> AbstractContextManager[None]:
    """What keeps a second process from the same work, until it is released."""
    if stage == "harvest" and not force:
        return Workers.from_environment().locked(directory)
    return locked(directory, stage)


def _is_follower() -> bool:
    """Whether torchrun or accelerate started this process beside another one, which writes and speaks."""
    return Workers.from_environment().rank > 0


def _check_processes(config: PipelineConfig | IngestedConfig, stage: str, force: bool) -> None:
    if Workers.from_environment().world == 1:
        return
    if stage in ("sample", "evaluate") or (stage == "harvest" and isinstance(config, IngestedConfig)):
        raise UserError(f"{stage}: works in one process; start it without the launcher (and without WORLD_SIZE)")
    if stage == "harvest" and force:
        raise UserError(
            "harvest --force: one of several workers could write into what another deletes; start one process with "
            "--force, stop it with Ctrl-C once it harvests, then start the workers"
        )


def _ignore(_numerics: dict[str, Any]) -> None:
    """What a follower does with its numerics where rank 0's are those that count."""


def _check_upstream(runs: AnyRuns, stage: str, streamed: bool) -> None:
    upstream = runs.upstream(stage)
    for before in runs.stages[: runs.stages.index(stage)]:
        if is_complete(runs.directory(before)):
            check_files(runs.directory(before))
    if streamed and upstream:
        upstream = runs.upstream(upstream)
    if upstream and not is_complete(runs.directory(upstream)):
        command = "harvest" if upstream == "sample" else upstream
        raise UserError(
            f"{stage}: the {upstream} stage for these settings is not complete ({runs.directory(upstream)}); "
            f"run `make {command}` with the same CONFIG and SET first"
        )


def _run(
    stage: str, todo: list[AnyRuns], begins: list[Begin], harvest: AbstractContextManager[Any] | None
) -> Iterator[dict[str, Any] | None]:
    """Summaries of a stage's runs, one by one; those of train together, as they share a reading of the store."""
    if stage == "train" and todo:
        from train import run as train

        tasks = [train.Task(r.config.train, r.directory(stage), b) for r, b in zip(todo, begins, strict=True)]
        with harvest or nullcontext() as made:
            summaries = train.run(tasks, todo[0].directory("harvest"), made)
        yield from summaries
        return
    for runs, begin_run in zip(todo, begins, strict=True):
        yield _run_one(stage, runs, begin_run)


def _run_one(stage: str, runs: AnyRuns, begin_run: Begin) -> dict[str, Any] | None:
    config, inputs, here = runs.config, runs.inputs, runs.directory
    if isinstance(config, IngestedConfig):
        return _run_ingested(stage, config, runs, begin_run)
    if stage == "sample":
        from harvest import sampling

        commit = resolved_commit(inputs.tokenizer)
        return sampling.run(config.model, commit, config.sample, inputs.sources, here("sample"), begin_run)
    commit = resolved_commit(inputs.model)
    if stage == "harvest":
        from harvest import run as harvest

        settings = config.model, commit, config.sample, config.harvest
        return harvest.Harvest(*settings, here("sample"), here("harvest"), begin_run).run()
    from evaluate import run as evaluate

    manifests = {name: read_manifest(here(name)) for name in STAGES[:3]}
    upstream = evaluate.Upstream(here("sample"), here("harvest"), here("train"), manifests)
    also = [resolved_commit(identity) for identity in inputs.also]
    return evaluate.run(
        config.model, commit, _resolved(config.evaluate, inputs), also, upstream, here("evaluate"), begin_run
    )


def _resolved(config: EvaluateConfig, inputs: Inputs) -> EvaluateConfig:
    """The settings with the second model's branch as the commit that the fingerprint holds."""
    if not config.diff or not config.diff.model or not inputs.diff:
        return config
    model = config.diff.model.model_copy(update={"revision": resolved_commit(inputs.diff)})
    return config.model_copy(update={"diff": config.diff.model_copy(update={"model": model})})


def _run_ingested(stage: str, config: IngestedConfig, runs: AnyRuns, begin_run: Begin) -> dict[str, Any]:
    """A stage of settings whose activations are given."""
    if stage == "harvest":
        from harvest import ingest

        return ingest.run(config.ingest, runs.directory("harvest"), begin_run)
    from evaluate import run as evaluate

    manifests = {name: read_manifest(runs.directory(name)) for name in ("harvest", "train")}
    upstream = evaluate.Upstream(None, runs.directory("harvest"), runs.directory("train"), manifests)
    also = [resolved_commit(identity) for identity in runs.inputs.also]
    return evaluate.run(None, None, config.evaluate, also, upstream, runs.directory("evaluate"), begin_run)


def _clear(directory: Path, confirm: Callable[[str], bool]) -> None:
    """Empty a run directory for --force, after asking where it is complete."""
    if is_complete(directory) and not confirm(f"{directory} is complete. Delete it and run anew?"):
        raise UserError(f"{directory}: left as it was; --yes deletes it without asking")
    (directory / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted must not pass for complete
    if remote_store(directory):
        from harvest.store_files import files_of

        files_of(directory).delete_all()  # before begun.json goes, which alone knows where it lies
    (directory / BEGUN).unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if path.is_symlink():
            path.unlink()  # the link alone: what it leads to is not ours
        elif path.is_dir() and not path.name.startswith(TRASH):
            path.rename(directory / f"{TRASH}{path.name}")  # at once, as deleting terabytes can be interrupted
        elif not path.is_dir() and not path.name.startswith(".lock-"):
            path.unlink()
    _empty_trash(directory)


def _empty_trash(directory: Path) -> None:
    for path in directory.glob(f"{TRASH}*"):
        shutil.rmtree(path)
