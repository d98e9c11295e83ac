"""`pipeline diff-stages`: follow the features of one SAE along two paths of fine-tuning (train.start_from).

Shape suffixes: F d_sae.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harvest.files import UserError, read_json
from harvest.hub import resolved_commit
from harvest.stage_directory import FINGERPRINT, Run
from pipeline.config import load
from pipeline.fingerprint import Memory, start_identity
from pipeline.metrics import read_evaluation
from pipeline.stages import find_runs
from pipeline.tables import table
from train.config import StartFrom
from train.start_files import find_start, is_on_hub, train_run

SHOWN = 20  # features in the terminal


class Link(NamedTuple):
    """A stage of a path: where its SAE lies, and the training run that made it, if it is one of ours."""

    start: StartFrom
    run: Run | None

    @property
    def name(self) -> str:
        """How the report calls it."""
        return self.run.path.name if self.run else self.start.path


def diff_stages(names: Sequence[str], root: Path, to: Path) -> list[str]:
    """Write the report into `to`; returns the lines of its table.

    `names` are the last training runs of the two paths: directories, fingerprints or settings files. Raises UserError
    for what is none of them or not finished, and for paths that do not begin at the same SAE.
    """
    memory = Memory(root / ".inputs.json")
    paths = [_path(_run(name, root), memory) for name in names]
    first = [start_identity(path[0].start, memory) for path in paths]
    memory.save()
    if first[0] != first[1]:
        raise UserError(
            f"diff-stages: the paths begin at different SAEs, {paths[0][0].start.path} and {paths[1][0].start.path}; "
            "name two runs that started from the same one (train.start_from)"
        )
    from evaluate.rotation import HookTurns, along, ranked, write_rotations
    from harvest.activation_store import slug

    hooks, others = ({_hook(folder) for folder in find_start(path[-1].start).folders} for path in paths)
    if not hooks & others:
        raise UserError(f"diff-stages: the paths have no hook in common: {sorted(hooks)} and {sorted(others)}")
    evaluated = [_evaluations(path[i], root) for path, i in ((paths[0], 0), (paths[0], -1), (paths[1], -1))]
    titles = ("first", "path 1", "path 2")
    found = {}
    for hook in sorted(hooks & others):
        one, two = (along(_decoders(path, hook)) for path in paths)
        pages = [_pages(title, runs, hook, to) for title, runs in zip(titles, evaluated, strict=True)]
        found[slug(hook)] = HookTurns(hook, (one, two), pages)
    write_rotations(to, [[_stage(link) for link in path] for path in paths], found)
    lines = []
    for turns in found.values():
        score_F = turns.score("score")
        rows = [(turns.hook, "score", "path 1", "path 2")]
        rows += [
            (str(i), *(f"{value[i]:.4f}" for value in (score_F, *(path.total_F for path in turns.paths))))
            for i in ranked(score_F)[:SHOWN].tolist()
        ]
        lines += table(rows, right=range(1, 4))
        lines.append(
            f"pages of these: make eval SET=evaluate.features.include=[{','.join(row[0] for row in rows[1:])}]"
        )
    return lines


def _run(name: str, root: Path) -> Run:
    """The training run that a directory, a fingerprint or a settings file means."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        found = [runs.of("train") for runs in find_runs(load(path, []), root)]
        if len(found) > 1:
            raise UserError(f"{name}: a sweep of {len(found)} training runs; name one by its fingerprint")
    else:
        found = [Run(root / "train" / name) if FINGERPRINT.fullmatch(name) else Run(path)]
    run = found[0]
    if not run.is_complete:
        raise UserError(
            f"{name!r}: no finished training run ({run.path}); name a train directory, its fingerprint, or settings"
        )
    if (stage := run.manifest.get("stage")) != "train":
        raise UserError(f"{run.path}: a {stage} directory; diff-stages takes those of train")
    return run


def _path(last: Run, memory: Memory) -> list[Link]:
    """The stages that led to a run, first ones first, each the very SAE that the next one started from."""
    path = [Link(StartFrom(path=str(last.path)), last)]
    while (run := path[0].run) and (given := run.settings.get("start_from")):
        commit = resolved_commit(run.inputs["start"])
        start = StartFrom(**given).model_copy(update={"revision": commit})
        if start_identity(start, memory) != run.inputs["start"]:
            raise UserError(
                f"{run.path}: started from other weights than {start.path} holds now; restore that SAE, or train anew"
            )
        path.insert(0, Link(start, None if is_on_hub(start) else train_run(Path(start.path, start.file))))
    if len(path) == 1:
        raise UserError(f"{last.path}: started from no other SAE (train.start_from), so there is nothing to compare")
    return path


def _hook(folder: Path) -> str:
    return str(read_json(folder / "sae.json").get("hook_name"))


def _decoders(path: Sequence[Link], hook: str) -> Iterator[Any]:
    """W_dec of each stage, float32 (d_sae, d_in)."""
    from train.start import read_given

    for link in path:
        yield read_given(link.start, hook, 1.0, offline=False)[0].W_dec.numpy()


def _stage(link: Link):
    from evaluate.rotation import Stage

    before = link.run.upstreams if link.run else []
    harvest = next((run for run in before if run.is_complete), None)
    if not harvest or not (model := harvest.settings.get("model")):  # pruned, or given activations
        return Stage(link.name, "–", "–")
    sample = next((run for run in harvest.upstreams if run.is_complete), None)
    sources = ", ".join(source["name"] for source in sample.settings["sources"]) if sample else "–"
    return Stage(link.name, model["name"], sources)


def _evaluations(link: Link, root: Path) -> list[Run]:
    """Complete evaluations of a stage, newest last."""
    every = [run for run in map(Run, (root / "evaluate").glob("*")) if run.is_complete] if link.run else []
    ours = [run for run in every if run.upstreams and link.run and run.upstreams[0].path.name == link.run.path.name]
    return sorted(ours, key=lambda run: run.manifest["finished"])


def _pages(title: str, evaluated: Sequence[Run], hook: str, to: Path):
    """The pages of features that a stage's evaluations have; the newest's where there are several."""
    from evaluate.rotation import Pages

    links: dict[int, str] = {}
    for run in evaluated:
        sae = read_evaluation(run).own(hook)
        if sae and (listed := sae.lists.get("feature_pages")):
            folder = Path(os.path.relpath((run.path / listed["index"]).parent, to))
            links |= {number: (folder / f"{number}.html").as_posix() for number in listed["numbers"]}
    return Pages(title, links)
