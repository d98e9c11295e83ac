"""The benchmark stage: problems answered with features operated on and without, graded, and compared in pairs.

Workers share the problems by RANK and WORLD_SIZE and exchange nothing but their journals (evaluate/attempts.py). Who
finds the last answer there grades all of them and writes the rest, which depends on the answers alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from evaluate.activity import read_activity
from evaluate.attempts import Attempt, Condition, Place, answer_keys, journal_of, line_of, read_answers, write_answers
from evaluate.benchmark_config import BenchmarkConfig
from evaluate.benchmark_figures import benchmark_figures, findings, marks_of
from evaluate.benchmark_page import write_page
from evaluate.config import EvaluateConfig
from evaluate.controls import Features, chosen_features, conditions_of
from evaluate.engine import Request, answers
from evaluate.feature_pages import read_scores
from evaluate.figures import Section, read_figures
from evaluate.grading import grade
from evaluate.operations import Interventions
from evaluate.prompts import check_lengths, position_limit, prompt_ids, thinking_tags
from evaluate.run import own_subjects, write_with
from evaluate.sampler import Sampling
from evaluate.subject import Subject
from evaluate.task_config import Task, task_of
from evaluate.tasks import Problem, load_problems
from harvest.chat_template import has_chat_template
from harvest.config import ModelConfig
from harvest.device import local_device, numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, locked
from harvest.progress import Progress
from harvest.stage_directory import MANIFEST, Run
from harvest.templates import THINK, THINK_END
from harvest.workers import Workers
from train.sae import Sae

PAGE = "benchmark.html"
ENDING = "benchmark-end"  # the lock of the worker that grades
ANSWERED = 1  # raised where the code answers the same request otherwise


class Plan(NamedTuple):
    """What is asked, in which conditions."""

    config: BenchmarkConfig
    subject: Subject
    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[list[int]]  # tokens of each problem
    conditions: Sequence[Condition]
    features: Features

    @property
    def maxima(self) -> dict[int, float]:
        """The largest activation of every feature that is operated on."""
        done = {operation.feature for condition in self.conditions for operation in condition.operations}
        return {feature: float(self.features.max_F[feature]) for feature in sorted(done)}


def run(
    model_config: ModelConfig,
    model_commit: str | None,
    task_commit: str | None,
    evaluate: EvaluateConfig,
    config: BenchmarkConfig,
    before: dict[str, Run],
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Answer this worker's problems; write attempts.jsonl, benchmark.html, metrics.json and report.html once all are.

    `before` are the runs of the stages before, by name; the commits are those of the hub, None for what is local.
    Returns the main figures, None where another worker has problems to answer or ends the stage. Raises UserError for a
    task or features that cannot be had, for prompts too long for the model, and as `answers` does.
    """
    workers = Workers.from_environment()
    device = local_device(resolve_device(config.runtime.device))
    dtype = resolve_dtype(config.compute_dtype, device)
    threads = set_threads(config.threads, device, hashed="benchmark.threads")
    runtime = evaluate.runtime.model_copy(update={"offline": config.runtime.offline})
    settings = evaluate.model_copy(update={"runtime": runtime})
    subjects = own_subjects(model_config, model_commit, settings, before, dtype, device, before["evaluate"].path)
    hook = config.hook or subjects[0].saved.hook
    plan = planned(next(each for each in subjects if each.saved.hook == hook), config, task_commit)
    here = numerics(device, dtype, threads=threads if device.type == "cpu" else None)
    begin(here)
    begun = Run(directory).begun
    every = [here, *(each for each in (begun["numerics"], *begun["mixed_with"]) if each != here)]
    keys = keys_of(plan, before["evaluate"].inputs, every)
    answer_share(plan, keys, workers, directory)
    found = known(keys, read_answers(directory))
    if len(found) < len(keys):
        print(_missing_text(len(keys) - len(found), len(keys)), flush=True)
        return None
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory, ENDING))
        except UserError:
            print("benchmark: every answer is there; another worker grades them", flush=True)
            return None
        return finish(plan, found, before, directory)


def planned(subject: Subject, config: BenchmarkConfig, task_commit: str | None = None) -> Plan:
    """Problems, their prompts and the conditions, without the model.

    Raises UserError as `run` does.
    """
    task, offline = task_of(config.task, config.source), config.runtime.offline
    problems = load_problems(task, config.seed, config.problems, commit=task_commit, offline=offline)
    found = _features(subject)
    conditions = conditions_of(config, chosen_features(config, found), found)
    tokenizer = subject.chat_tokenizer()
    if config.chat and not has_chat_template(tokenizer):
        raise UserError("benchmark.chat: true: this model's tokenizer has no chat template; leave it out, or false")
    prompts = prompt_ids(tokenizer, [problem.prompt for problem in problems], config.chat, subject.contexts.bos)
    if "thinking" in config.where:
        try:
            thinking_tags(tokenizer, prompts, config.chat)
        except UserError as error:
            raise UserError(f"benchmark.{error}") from None
    return Plan(config, subject, task, problems, prompts, conditions, found)


def _features(subject: Subject) -> Features:
    """What an evaluation has left of all features."""
    activity, score = read_activity(subject.file("activity", ".safetensors")), subject.config.reason_score
    scored = read_scores(subject.file("reason_score", ".npz")) if score else None
    return Features(
        density_F=activity["active"].sum(0) / max(1, activity["rows"].sum()),
        max_F=activity["max"].max(0),
        norm_F=subject.saved.sae.W_dec.norm(dim=1).cpu().numpy(),
        score_F=scored and scored.score_F,
        quantile=score.quantile if score else 1.0,
    )


def keys_of(
    plan: Plan, inputs: Mapping[str, Any], every_numerics: Sequence[dict[str, Any]]
) -> dict[Place, tuple[str, ...]]:
    """The keys of every answer, under each of the numerics: this process' first, then others that were allowed.

    `inputs` name the model by content.
    """
    config, saved = plan.config, plan.subject.saved
    model = {name: inputs.get(name) for name in ("model", "tokenizer", "generation")}
    sampling = [config.max_new_tokens, config.temperature, config.top_p, config.slots]
    sae = [saved.hook, _digest(saved.sae)]
    conditions = [
        [sae, *([*o, plan.maxima[o.feature] if o.op in ("add", "set") else None] for o in condition.operations)]
        if condition.operations
        else []
        for condition in plan.conditions
    ]
    by_numerics = [
        answer_keys([ANSWERED, model, each, sampling], conditions, plan.prompts, config.samples, config.seed)
        for each in every_numerics
    ]
    return {place: tuple(by_place[place] for by_place in by_numerics) for place in by_numerics[0]}


def _digest(sae: Sae) -> str:
    """sha256 of all that an SAE computes with."""
    rule = {name: getattr(sae, name) for name in sae.rule}
    digest = hashlib.sha256(repr([sae.kind, sae.scale, rule]).encode())
    for name, value in sorted(sae.parameters.items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def known(keys: Mapping[Place, tuple[str, ...]], answered: Mapping[str, Attempt]) -> dict[Place, tuple[str, Attempt]]:
    """The answers that there are with their keys, each under its own numbers."""
    found = {}
    for place, under in keys.items():
        if key := next((key for key in under if key in answered), None):
            found[place] = key, answered[key]._replace(**place._asdict())
    return found


def answer_share(plan: Plan, keys: Mapping[Place, tuple[str, ...]], workers: Workers, directory: Path) -> None:
    """Answer what is lacking of this worker's problems; what another complete benchmark has is taken over."""
    rank, world = workers
    # Problem by problem: what is there at any time is of all conditions.
    share = sorted((p for p in keys if p.problem % world == rank), key=lambda p: (p.problem, p.condition, p.sample))
    have = set(known({place: keys[place] for place in share}, read_answers(directory)))
    with journal_of(directory, rank) as journal:
        for sibling in _siblings(directory) if len(have) < len(share) else ():
            wanted = {place: keys[place][:1] for place in share if place not in have}
            for place, (key, attempt) in known(wanted, read_answers(sibling)).items():
                journal.add(line_of(key, attempt))
                have.add(place)
        if rank == 0:
            print(_said(plan, len(keys), len(have), world), flush=True)
        lacking = [place for place in share if place not in have]
        if not lacking:
            return
        path = directory / "progress.json"
        with Progress("benchmark", len(share), "answers", start=len(have), path=path, quiet=rank > 0) as progress:
            for place, attempt in _answered(plan, lacking):
                journal.add(line_of(keys[place][0], attempt))
                progress.advance(1)


def _siblings(directory: Path) -> list[Path]:
    """Other complete benchmarks beside this one."""
    return [path.parent for path in sorted(directory.parent.glob(f"*/{MANIFEST}")) if path.parent != directory]


def _answered(plan: Plan, places: Sequence[Place]) -> Iterator[tuple[Place, Attempt]]:
    """Answers as they end."""
    config, model, tokenizer = plan.config, plan.subject.model(), plan.subject.chat_tokenizer()
    causal: Any = model.model
    new = config.max_new_tokens
    try:
        check_lengths(plan.prompts, new, position_limit(causal.config))
    except UserError as error:
        raise UserError(f"benchmark.max_new_tokens: {new}: {error}") from None
    lists = [condition.operations for condition in plan.conditions]
    interventions = Interventions(plan.subject.on_device().saved, plan.maxima, lists)
    requests = [
        Request(plan.prompts[place.problem], place.condition, (config.seed, place.problem, place.sample))
        for place in places
    ]
    sampling = Sampling(new, config.temperature, config.top_p)
    options = {"slots": config.slots, "chat": config.chat}
    for number, completion in answers(model, tokenizer, interventions, requests, sampling, **options):
        text, ids, ended, processed, changed = completion
        thought = thinking_tokens(tokenizer, plan.prompts[places[number].problem], ids)
        yield places[number], Attempt(*places[number], text, len(ids), thought, ended, processed, changed)


def thinking_tokens(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> int | None:
    """How many tokens of an answer stand before its first </think>; all where it was cut off while it thought.

    None where the tokenizer has no such tokens.
    """
    vocabulary = tokenizer.get_vocab()
    if not {THINK, THINK_END} <= vocabulary.keys():
        return None
    start, end = vocabulary[THINK], vocabulary[THINK_END]
    if end in answer:
        return list(answer).index(end)
    last = next((token for token in reversed([*prompt, *answer]) if token in (start, end)), end)
    return len(answer) if last == start else 0


def finish(
    plan: Plan, found: Mapping[Place, tuple[str, Attempt]], before: Mapping[str, Run], directory: Path
) -> dict[str, Any]:
    """Grade all answers and write every file but the manifest; the main figures."""
    attempts, grades = [found[place][1] for place in sorted(found)], []
    with Progress("grading", len(attempts), "answers", path=directory / "progress.json") as progress:
        for attempt in attempts:
            answer = attempt.text.rpartition(THINK_END)[2]
            grades.append(grade(plan.task, plan.problems[attempt.problem], answer))
            progress.advance(1)
    size = len(plan.conditions), len(plan.problems), plan.config.samples
    section = benchmark_figures(plan.conditions, marks_of(attempts, grades, *size), plan.config.seed)
    section.lists.update(_about(plan))
    keys = [found[place][0] for place in sorted(found)]
    lines = zip(keys, attempts, grades, strict=True)
    write_answers(directory, ({"key": key, **attempt._asdict(), **mark._asdict()} for key, attempt, mark in lines))
    title = plan.task.name or str(plan.task.path)
    write_page(directory / PAGE, title, plan.problems, plan.conditions, attempts, grades, section)
    _write_report(plan, section, before, directory)
    return _main_figures(section)


def _about(plan: Plan) -> dict[str, Any]:
    """What the lists say of the task, and of the features, so that a control can be compared with its feature."""
    found, maxima = plan.features, plan.maxima
    features = {
        str(feature): {"density": float(found.density_F[feature]), "max_activation": largest}
        | {"step": largest * float(found.norm_F[feature])}
        for feature, largest in maxima.items()
    }
    return {"task": plan.task._asdict(), "features": features}


def _write_report(plan: Plan, section: Section, before: Mapping[str, Run], directory: Path) -> None:
    """metrics.json and report.html of the evaluation with the benchmark's figures; its feature pages stay there."""
    evaluated = before["evaluate"].path
    found, hook = read_figures(evaluated), plan.subject.saved.hook
    saes = []
    for sae in found.saes:
        lists = dict(sae.lists)
        if pages := lists.get("feature_pages"):
            lists["feature_pages"] = {**pages, "index": f"../../evaluate/{evaluated.name}/{pages['index']}"}
        if sae.hook == hook and not sae.name:
            sae = sae._replace(figures=(*sae.figures, *section.figures))
            lists["benchmark"] = section.lists
        saes.append(sae._replace(lists=lists))
    write_with(directory, found._replace(saes=tuple(saes)), "benchmark", before, plan.subject.store)


def _said(plan: Plan, total: int, have: int, world: int) -> str:
    """What is to be done, before the first answer."""
    config, names = plan.config, [condition.name for condition in plan.conditions]
    task, asked = plan.task.name or plan.task.path, f"{len(plan.problems):,} problems, {plan.config.samples:,} samples"
    shared = f", shared by {world} workers" if world > 1 else ""
    kept = f"; {have:,} of this worker's are there from before" if have else ""
    return (
        f"benchmark: {task}, {asked}, {len(names):,} conditions ({'; '.join(names)})\n"
        f"benchmark: {total:,} answers, {total * config.max_new_tokens:,} tokens at most{shared}{kept}"
    )


def _missing_text(missing: int, total: int) -> str:
    return (
        f"benchmark: this worker's answers are there; {missing:,} of {total:,} are missing, which other workers give. "
        "The last of them ends the benchmark. If none runs any more, start it again, with any number of workers, to "
        "get just these"
    )


def _main_figures(section: Section) -> dict[str, Any]:
    """pass@1 and tokens of each condition."""
    names = {"pass_at_1": "pass@1", "tokens": "tokens"}
    out: dict[str, Any] = {
        entry["name"]: {title: entry[name]["value"] for name, title in names.items()}
        for entry in section.lists["conditions"]
    }
    return out | {"finding": " ".join(findings(section.lists))}
