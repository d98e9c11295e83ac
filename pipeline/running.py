"""Running a stage: unless it is complete, from where it was left, with the locks that keep others out."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from harvest.files import UserError, locked
from harvest.stage_directory import BEGUN, MADE_ANEW, MANIFEST, DamagedManifestError, Run
from harvest.workers import SHARED, Workers
from pipeline.stages import GIVEN, PUBLISHED, Begin, Job, Runs, Stage
from pipeline.tables import figures
from pipeline.watch import Watch

TRASH = ".trash-"


def run_stage(
    sweep: Sequence[Runs],
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
    # Beside another process of torchrun or accelerate: that one, rank 0, begins the stage and speaks.
    beside = Workers.from_environment().rank > 0
    todo: dict[Path, Runs] = {}
    for directory, runs in {runs.directory(stage): runs for runs in sweep}.items():
        if not force and _is_whole(Run(directory)):
            if not beside:
                print(f"{stage:9} complete  {directory}", flush=True)
            continue
        _check_upstream(runs, stage, streamed=harvest is not None)
        todo[directory] = runs
    if not todo:
        return
    record = sweep[0].stages[stage]
    _check_processes(record, stage, force)
    if not beside:
        from pipeline.settings_check import check_before

        check_before(stage, sweep)
    watch = Watch(sweep[0].config, sweep[0].inputs, sweep[0].root, stage)
    with ExitStack() as stack:
        jobs = []
        for directory, runs in todo.items():
            if beside:
                begin = _join(runs, stage, allow_mixed, stack, watch)
            else:
                stack.enter_context(_lock(directory, stage, force))
                _prepare(Run(directory), force, confirm)
                start = partial(Run(directory).begin, runs.identity(stage), allow_mixed=allow_mixed)
                begin = watched(watch, start)
            jobs.append(Job(runs, directory, begin, harvest))
        for (directory, _), summary in zip(todo.items(), record.run(jobs), strict=True):
            if summary is not None and (stage in SHARED or not beside):  # who makes the last part finishes it
                watch.check_unchanged()
                Run(directory).finish(summary)
                print("\n".join([stage, *figures(summary)]), flush=True)
                print(f"{stage:9} complete  {directory}", flush=True)


def _is_whole(run: Run) -> bool:
    """Whether a stage is complete and what it left is there; an evaluation that is not whole is to be made anew.

    Raises UserError that names a missing or changed file of another stage, which would take hours.
    """
    if not run.is_complete:
        return False
    if run.stage not in MADE_ANEW:
        run.check(read=False)
        return True
    try:
        reason = damage(run)
    except DamagedManifestError as error:
        reason = str(error)
    if reason:
        print(f"{run.stage:9} is made anew: {reason}", flush=True)
    return not reason


def damage(run: Run) -> str:
    """What is wrong with the files of a complete run by a look of milliseconds, but that evaluations are read.

    Raises UserError for a manifest that is damaged or belongs to another run.
    """
    if changed := run.changed() if run.stage in MADE_ANEW else run.missing():
        return run.said(changed)
    if run.stage in MADE_ANEW and run.is_of_other_weights:
        return f"{run.path}: its SAE was trained anew since, and has other weights now"
    return ""


def watched(watch: Watch, begin: Begin) -> Begin:
    """What begins a run once the files that it reads were found to be those of its fingerprint."""

    def begin_watched(numerics: dict[str, Any]) -> None:
        watch.check()
        begin(numerics)

    return begin_watched


def _join(runs: Runs, stage: str, allow_mixed: bool, stack: ExitStack, watch: Watch) -> Begin:
    """How a process beside rank 0 begins."""
    if stage not in SHARED:
        return lambda _numerics: None  # in training, rank 0 compares the numerics
    run, seconds = runs.of(stage), getattr(runs.config, stage).runtime.wait_seconds
    stack.enter_context(_lock(run.path, stage, force=False))
    return watched(watch, partial(run.join, allow_mixed=allow_mixed, seconds=seconds))


def _lock(directory: Path, stage: str, force: bool) -> AbstractContextManager[None]:
    """What keeps a second process from the same work, until it is released."""
    if stage in SHARED and not force:
        return Workers.from_environment().locked(directory, stage)
    return locked(directory, stage)


def _check_processes(record: Stage, stage: str, force: bool) -> None:
    if Workers.from_environment().world == 1:
        return
    alone = ("sample", *(name for name in MADE_ANEW if name not in SHARED))
    if stage in alone or record in (GIVEN, PUBLISHED):
        raise UserError(f"{stage}: works in one process; start it without the launcher (and without WORLD_SIZE)")
    if stage in SHARED and force:
        raise UserError(
            f"{stage} --force: one of several workers could write into what another deletes; start one process with "
            "--force, stop it with Ctrl-C once it is at work, then start the workers"
        )


def _check_upstream(runs: Runs, stage: str, streamed: bool) -> None:
    before = runs.before(stage)
    for run in before.values():
        if run.is_complete:
            run.check()
    upstreams = runs.stages["harvest" if streamed and stage == "train" else stage].upstreams
    for name in (name for name in upstreams if not before[name].is_complete):
        command = {"sample": "harvest", "evaluate": "eval"}.get(name, name)  # of the Makefile
        raise UserError(
            f"{stage}: the {name} stage for these settings is not complete ({runs.directory(name)}); "
            f"run `make {command}` with the same CONFIG and SET first"
        )


def trained(runs: Runs, command: str) -> Path:
    """The directory of a complete training run, its files checked, for what uses an SAE.

    Raises UserError when it is not complete, or a file is missing or changed.
    """
    run = runs.of("train")
    if not run.is_complete:
        raise UserError(
            f"{command}: the train stage for these settings is not complete ({run.path}); run `make train` with the "
            "same CONFIG and SET first"
        )
    run.check()
    return run.path


def _prepare(run: Run, force: bool, confirm: Callable[[str], bool]) -> None:
    """Clear the directory for --force, after asking where it is complete, and take away what must not count."""
    if force and run.is_begun:
        _clear(run, confirm)
    (run.path / MANIFEST).unlink(missing_ok=True)  # of an evaluation that is not whole
    _empty_trash(run.path)
    print(f"{run.stage:9} {'resumes' if run.is_begun else 'runs'}  {run.path}", flush=True)


def _clear(run: Run, confirm: Callable[[str], bool]) -> None:
    directory = run.path
    if run.is_complete and not confirm(f"{directory} is complete. Delete it and run anew?"):
        raise UserError(f"{directory}: left as it was; --yes deletes it without asking")
    (directory / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted must not pass for complete
    if run.store_url:
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


def _empty_trash(directory: Path) -> None:
    for path in directory.glob(f"{TRASH}*"):
        shutil.rmtree(path)
