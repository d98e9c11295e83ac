"""benchmark.html: accuracy against length, the table of conditions, and the problems, each with a page of its answers.

benchmark.html     charts, table, and all problems: search, sort, compare no intervention with any condition
problems/1.html    the second problem: its answers in every condition, side by side

A page for each problem keeps benchmark.html small: long answers of a large benchmark are gigabytes. The search has a
share of each answer, SEARCHED characters in all. Problems and answers are untrusted text: escaped, what does not show
is named, and a content security policy allows nothing but the one style and the one script.
"""

import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evaluate.attempts import Attempt, Condition
from evaluate.benchmark_figures import findings
from evaluate.benchmark_views import FILTERS, charts
from evaluate.feature_pages import content_policy
from evaluate.figures import Section, definitions
from evaluate.grading import Grade
from evaluate.report import environment, write_text
from evaluate.tasks import Problem
from evaluate.visible import visible

FILE, FOLDER = "benchmark.html", "problems"
SEARCHED = 8_000_000  # characters of answers that benchmark.html holds to search in
ASKED = 2000  # of a problem
END = "</think>"

Answers = dict[tuple[int, int], tuple[Attempt, Grade]]  # to one problem, by condition and sample


def write_page(
    path: Path,
    title: str,
    problems: Sequence[Problem],
    conditions: Sequence[Condition],
    attempts: Sequence[Attempt],
    grades: Sequence[Grade],
    section: Section,
) -> None:
    """Write benchmark.html at `path` and a page for each problem in `problems` beside it, in place of earlier ones.

    `grades` are those of `attempts`, `section` is what `benchmark_figures` gives of them.
    """
    css, parts, script = (_template(name) for name in ("features.css", "benchmark.css", "benchmark.js"))
    style = css + parts
    templates = environment(
        {"visible": visible, **FILTERS},
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
        lists=section.lists,
        conditions=conditions,
    )
    by_problem: list[Answers] = [{} for _ in problems]
    for attempt, grade in zip(attempts, grades, strict=True):
        by_problem[attempt.problem][attempt.condition, attempt.sample] = attempt, grade
    folder = path.parent / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    folder.mkdir(parents=True)
    page = templates.get_template("problem.html")
    for number, (problem, answers) in enumerate(zip(problems, by_problem, strict=True)):
        samples = [
            [_shown(answers.get((c, n))) for c in range(len(conditions))] for n in range(section.lists["samples"])
        ]
        right = [
            sum(grade.correct for (c, _), (_, grade) in answers.items() if c == each) for each in range(len(conditions))
        ]
        around = {"problem": problem, "number": number, "count": len(problems)}
        write_text(folder / f"{number}.html", page.render(**around, samples=samples, right=right))
    share = SEARCHED // max(1, len(attempts))
    html = templates.get_template("benchmark.html").render(
        title=title,
        findings=findings(section.lists),
        charts=charts(section.lists),
        rows=[_row(*each, len(conditions), share) for each in zip(problems, by_problem, strict=True)],
        searched=share if any(len(attempt.text) > share for attempt in attempts) else None,
        definitions=definitions()["benchmark"],
    )
    write_text(path, html)


def _template(name: str) -> str:
    return files("evaluate").joinpath("templates", name).read_text("utf-8")


def _shown(answered: tuple[Attempt, Grade] | None) -> dict[str, Any] | None:
    """An answer as its problem's page has it, thinking apart."""
    if answered is None:
        return None
    attempt, grade = answered
    thinking, end, text = attempt.text.rpartition(END)
    return {
        **attempt._asdict(),
        "mark": "right" if grade.correct else "unread" if grade.parsed is None else "wrong",
        "parsed": grade.parsed,
        "thinking": thinking.strip() if end else None,
        "text": text.strip(),
    }


def _row(problem: Problem, answers: Answers, conditions: int, share: int) -> dict[str, Any]:
    """A problem in the list: right answers and mean tokens in each condition, and the text that the search reads."""
    by_condition = [[each for (c, _), each in answers.items() if c == number] for number in range(conditions)]
    texts = [problem.id, problem.prompt[:ASKED], problem.answer[:ASKED]]
    texts += [attempt.text[:share] for attempt, _ in answers.values()]
    return {
        "problem": problem,
        "right": [sum(grade.correct for _, grade in found) for found in by_condition],
        "tokens": [round(sum(a.tokens for a, _ in found) / max(1, len(found)), 1) for found in by_condition],
        "text": visible(" ".join(" ".join(texts).split())).lower(),
    }
