"""The explain stage: asks a language model what features mean, tests what it says, and writes the pages anew with it.

calls.jsonl is the journal of all answers: what was asked once, here or in another complete run of the stage on the same
evaluation, is not asked again. What is written after the last answer depends on the answers alone, not on their order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluate.activity import Activity, read_activity
from evaluate.asking import Answer, Question, ask, question_key, read_journal
from evaluate.config import EvaluateConfig
from evaluate.counterexamples import Claim, candidates, counterexamples, most_calls, reading_of
from evaluate.endpoint import Endpoint
from evaluate.explain_config import ExplainConfig, endpoint_of
from evaluate.explanations import (
    Explanation,
    Part,
    Writer,
    explain_question,
    others,
    questions_of,
    read_explanation,
    scores,
)
from evaluate.falsify_config import FalsifyConfig
from evaluate.feature_pages import pages
from evaluate.figures import Figure, Measured, Section, read_figures
from evaluate.intervals import with_intervals
from evaluate.journal import Journal
from evaluate.operations import check_features
from evaluate.run import own_subjects, write_with
from evaluate.subject import Subject
from evaluate.windows import Examples, Text, Wanted, choose_examples, read_firings
from harvest.config import ModelConfig
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.files import UserError, write_sealed
from harvest.progress import Progress
from harvest.stage_directory import Run

JOURNAL = "calls.jsonl"
SCHEMA = 1
FIGURES = ("detection", "fuzzing", "control", "control_fuzzing")
CHARACTERS, WRITTEN = 4, 60  # about so many characters a token, and tokens an answer
PLACEHOLDER = Explanation("x" * 40, "x" * 120)


class Planned(NamedTuple):
    """One SAE and what is asked about it."""

    subject: Subject
    activity: Activity
    writer: Writer
    examples: dict[int, Examples]  # by feature
    left_out: dict[int, str]  # why other features are not explained


def run(
    model_config: ModelConfig,
    model_commit: str | None,
    evaluate: EvaluateConfig,
    config: ExplainConfig,
    before: dict[str, Run],
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `explanations-<hook>.json`, and the evaluation's pages, metrics.json and report.html with them.

    `before` are the runs of the stages before, by name. Returns the main figures. Raises UserError for features that
    cannot be explained where the settings name them, where there is none at all, and as `ask` does.
    """
    device = resolve_device(evaluate.runtime.device)
    dtype = resolve_dtype(evaluate.downstream.compute_dtype if evaluate.downstream else "auto", device)
    threads = set_threads(evaluate.runtime.threads, device)
    begin(numerics(device, dtype, threads=threads if device.type == "cpu" else None))
    evaluated = before["evaluate"].path
    found = read_figures(evaluated)
    subjects = own_subjects(model_config, model_commit, evaluate, before, dtype, device, evaluated)
    plans = [plan(subject.on_device(), found.own(subject.saved.hook), config) for subject in subjects]
    endpoint = endpoint_of(config)
    asker = Asker(endpoint, directory, _siblings(directory, before["evaluate"]))
    _say(plans, config, endpoint, asker)
    sections = explain(plans, config, asker)
    measured = []
    for planned, section in zip(plans, sections, strict=True):
        subject = planned.subject
        sae = found.own(subject.saved.hook)
        assert sae
        path = directory / subject.file("explanations", ".json").name
        write_sealed(path, {"schema": SCHEMA, "hook": subject.saved.hook, **section.lists})
        lists = {**sae.lists, "explanations": section.lists}
        injected = sae.lists.get("token_injection", {}).get("features", [])
        if config.falsify:
            lists["counterexamples"] = _falsify(planned, lists, config.falsify, asker)
        if written := pages(subject, planned.activity, injected, explained=by_feature(lists), to=directory):
            lists["feature_pages"] = written.lists
        measured.append(sae._replace(figures=(*sae.figures, *section.figures), lists=lists))
    found = found._replace(saes=(*measured, *(sae for sae in found.saes if sae.name)))
    write_with(directory, found, "explanations", before, subjects[0].store)
    return {sae.hook: _main_figures(sae) for sae in measured} | {"calls": asker.calls, "tokens": asker.tokens}


def plan(subject: Subject, evaluated: Measured | None, config: ExplainConfig) -> Planned:
    """The features of an SAE that are explained, and their examples.

    Raises UserError where the settings name a feature without enough examples, and where no feature has enough.
    """
    check_features(config.feature_ids, subject.saved.sae.d_sae, "explain.feature_ids")
    has_page = evaluated.lists.get("feature_pages", {}).get("numbers", []) if evaluated else []
    features = list(config.feature_ids or has_page)
    if not features:
        raise UserError(f"explain: no feature of {subject.saved.hook} has a page; explain.feature_ids chooses some")
    activity = read_activity(subject.file("activity", ".safetensors"))
    firings, contexts = read_firings(subject, features)
    text = Text(activity, contexts, config.tokens)
    wanted = Wanted(config.strongest, config.samples, config.tests, config.hard_share, config.seed)
    chosen = {f: choose_examples(f, firing, text, wanted) for f, firing in zip(features, firings, strict=True)}
    left_out = {feature: each.missing for feature, each in chosen.items() if each.missing}
    if left_out and config.feature_ids:
        first = next(iter(left_out))
        raise UserError(f"explain.feature_ids: {first}: it {left_out[first]} ({subject.saved.hook}); take it out")
    if len(left_out) == len(features):
        reasons = "; ".join(f"{count} are such that each {why}" for why, count in Counter(left_out.values()).items())
        raise UserError(
            f"explain: none of the {len(features)} features of {subject.saved.hook} can be explained: {reasons}; "
            "explain.feature_ids chooses others"
        )
    examples = {feature: each for feature, each in chosen.items() if feature not in left_out}
    return Planned(subject, activity, Writer(subject.tokenizer()), examples, left_out)


class Asker:
    """Asks, and counts what was answered; `siblings` are journals of complete runs on the same evaluation."""

    def __init__(self, endpoint: Endpoint, directory: Path, siblings: Iterable[Path]) -> None:
        self.endpoint, self.directory, self.siblings = endpoint, directory, list(siblings)
        self.calls = self.tokens = 0
        self.journal = directory / JOURNAL

    def ask(self, title: str, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in the order of the questions."""
        self._take_over(questions)
        with Progress(title, len(questions), "calls", path=self.directory / "progress.json") as progress:
            answers = ask(self.endpoint, questions, self.journal, progress)
        self.calls += len(answers)
        self.tokens += sum(answer.prompt_tokens + answer.completion_tokens for answer in answers)
        return answers

    def _take_over(self, questions: Sequence[Question]) -> None:
        """Copy the answers that other journals have."""
        known = read_journal(self.journal)
        lacking = {key for each in questions if (key := question_key(self.endpoint.model, each)) not in known}
        for sibling in self.siblings if lacking else ():
            taken = {key: answer for key, answer in read_journal(sibling).items() if key in lacking}
            with Journal(self.journal) as journal:
                for key, answer in taken.items():
                    journal.add({"key": key, **answer._asdict()})
            lacking -= set(taken)


def _siblings(directory: Path, evaluated: Run) -> list[Path]:
    """Journals of other complete runs of the stage on this evaluation."""
    runs = [Run(path.parent) for path in sorted(directory.parent.glob(f"*/{JOURNAL}")) if path.parent != directory]
    return [
        run.path / JOURNAL
        for run in runs
        if run.is_complete and evaluated.path.name in [each.path.name for each in run.upstreams]
    ]


def explain(plans: Sequence[Planned], config: ExplainConfig, asker: Asker) -> list[Section]:
    """Explanations and their scores, of all SAEs in the same two rounds of calls; a section for each SAE."""
    named = [(planned, feature) for planned in plans for feature in planned.examples]
    first = [explain_question(planned.examples[feature], planned.writer, config) for planned, feature in named]
    said = iter([read_explanation(answer) for answer in asker.ask("explaining", first)])
    explained = [{feature: next(said) for feature in planned.examples} for planned in plans]
    tests = [_tests(planned, found, config) for planned, found in zip(plans, explained, strict=True)]
    parts = [part for by_key in tests for parts in by_key.values() for part in parts]
    answers = iter(asker.ask("testing", [part.question for part in parts]))
    sections = []
    for planned, found, by_key in zip(plans, explained, tests, strict=True):
        answered = {key: [next(answers) for _ in parts] for key, parts in by_key.items()}
        entries = [_entry(planned, feature, found, by_key, answered) for feature in planned.examples]
        left_out = [{"feature": feature, "reason": reason} for feature, reason in planned.left_out.items()]
        lists = {"model": config.model, "features": entries, "left_out": left_out}
        sections.append(Section(_figures(entries), lists))
    return sections


def _tests(
    planned: Planned, explained: dict[int, Explanation], config: ExplainConfig
) -> dict[tuple[int, int], list[Part]]:
    """The calls by (feature, feature whose explanation is given)."""
    pairs = [(feature, feature) for feature, found in explained.items() if not found.problem]
    pairs += others(explained, config.seed).items()
    return {
        (feature, of): questions_of(feature, planned.examples[feature], explained[of], planned.writer, config)
        for feature, of in pairs
    }


def _entry(
    planned: Planned,
    feature: int,
    explained: dict[int, Explanation],
    tests: dict[tuple[int, int], list[Part]],
    answered: dict[tuple[int, int], list[Answer]],
) -> dict[str, Any]:
    """What is said of one feature."""
    found, examples = explained[feature], planned.examples[feature]
    problems = Counter([found.problem] if found.problem else [])
    values: dict[str, Any] = dict.fromkeys(FIGURES)
    for key, parts in tests.items():
        if key[0] == feature:
            scored, wrong = scores(examples, parts, answered[key])
            problems += wrong
            names = ("detection", "fuzzing") if key[1] == feature else ("control", "control_fuzzing")
            values |= dict(zip(names, scored.values(), strict=True))
    counts = {"explaining": len(examples.explaining), "active": len(examples.active), "silent": len(examples.silent)}
    return {
        "feature": feature,
        "label": found.label,
        "sentence": found.sentence,
        **values,
        "control_of": next((of for one, of in tests if one == feature != of), None),
        "examples": counts | {"hard": examples.hard},
        "problems": dict(sorted(problems.items())),
    }


def _figures(entries: Sequence[dict[str, Any]]) -> list[Figure]:
    """Means over features, with intervals by features; how many were explained, and how many answers were unusable."""
    figures = [Figure("explanations", "explained", sum(bool(each["label"]) for each in entries))]
    for name in FIGURES:
        values = np.array([each[name]["value"] for each in entries if each[name]])
        if len(values):
            found = with_intervals(lambda w, v=values: {"mean": (w @ v) / w.sum(1)}, len(values), ("mean",))
            interval = found.get("mean_interval")
            figures.append(Figure("explanations", name, found["mean"], interval=interval and tuple(interval)))
    problems = sum(sum(each["problems"].values()) for each in entries)
    return [*figures, Figure("explanations", "problems", problems)]


def _falsify(planned: Planned, lists: dict[str, Any], config: FalsifyConfig, asker: Asker) -> dict[str, Any]:
    """The section "counterexamples", of explained features that injection leaves context-dependent; of any explained
    ones where nothing was injected."""
    explained = {each["feature"]: each for each in lists["explanations"]["features"] if each["label"]}
    injected = lists.get("token_injection")
    wanted = candidates(injected["features"], config) if injected else list(explained)[: config.features]
    claims = [
        Claim(
            feature,
            f"{explained[feature]['label']}. {explained[feature]['sentence']}",
            planned.activity.excerpts("strongest", feature),
        )
        for feature in wanted
        if feature in explained
    ]
    if not claims:
        print("explain.falsify: nothing to try: no explained feature was left context-dependent", flush=True)
    return counterexamples(reading_of(planned.subject), claims, partial(asker.ask, "falsifying"), config)


def by_feature(lists: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What pages show of each feature: its explanation, and counterexamples with their rule."""
    found = {each["feature"]: each for each in lists["explanations"]["features"]}
    tried = lists.get("counterexamples", {})
    rule = {name: value for name, value in tried.items() if name != "features"}
    falsified = {each["feature"]: {**each, "rule": rule} for each in tried.get("features", ())}
    return {feature: {**each, "counterexamples": falsified.get(feature)} for feature, each in found.items()}


def _say(plans: Sequence[Planned], config: ExplainConfig, endpoint: Endpoint, asker: Asker) -> None:
    """How many calls and tokens it will be, before the first."""
    questions: list[Question] = []
    for planned in plans:
        for reason, count in Counter(planned.left_out.values()).items():
            print(f"explain: {count} features of {planned.subject.saved.hook} are left out: each {reason}", flush=True)
        for feature, examples in planned.examples.items():
            parts = questions_of(feature, examples, PLACEHOLDER, planned.writer, config)
            tests = [part.question for part in parts] * (2 if len(planned.examples) > 1 else 1)
            questions += [explain_question(examples, planned.writer, config), *tests]
    read = sum(len(content) for each in questions for _, content in each.messages) // CHARACTERS
    features = sum(len(planned.examples) for planned in plans)
    kept = len(read_journal(asker.journal))
    more = most_calls(config.falsify, min(features, config.falsify.features)) if config.falsify else 0
    print(
        f"explain: {features:,} features, {len(questions):,} calls to {endpoint.model} at {endpoint.base_url}: about "
        f"{read:,} tokens to read and {WRITTEN * len(questions):,} to write"
        + (f"; up to {more:,} calls more for counterexamples" if more else "")
        + (f"; {kept:,} answers are there from before" if kept else ""),
        flush=True,
    )


def _main_figures(sae: Measured) -> dict[str, Any]:
    names = ("explained", *FIGURES, "problems")
    return {name: figure.value for name in names if (figure := sae.figure(name, "explanations"))}
