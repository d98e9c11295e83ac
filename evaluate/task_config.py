"""What a benchmark asks: the tasks that are shipped, and settings for sets of one's own.

A task is a source of rows, the columns that hold problem and answer, a prompt and a way to grade. The shipped ones are
pinned to a commit of the hub, so that a figure always is of the same problems; `arithmetic` is made
(evaluate/arithmetic.py). No torch here: a settings error must answer at once.
"""

import difflib
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from harvest.config import Settings, Source
from harvest.files import UserError
from harvest.source_files import is_local

GradeBy = Literal["math", "choice"]
ARITHMETIC = "arithmetic"
PROBLEM, CHOICES = "{problem}", "{choices}"  # what a prompt has in the place of a row's text
# The first is what R1's authors recommend (the model card of DeepSeek-R1).
PROMPTS: dict[GradeBy, str] = {
    "math": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "choice": "{problem}\n\n{choices}\n\n"
    "Please reason step by step, and put the letter of your choice within \\boxed{}.",
}


class TaskSource(Settings):
    """A set of problems of one's own (`task: null`), or what differs from a shipped task; null is the task's own."""

    path: str | None = None
    """Hub id, or local JSON (Lines or an array), parquet or arrow: a file, a folder or a glob, as sample.sources."""
    revision: str | None = None
    """Hub commit of the data set."""
    subset: str | None = None
    """Configuration of a hub data set, as gsm8k's `main`."""
    split: str | None = None
    """Split of a hub data set, or of a local folder that has files of several."""
    problem: str | None = None
    """Column of the problem's text."""
    answer: str | None = None
    """Column of the right answer. math: LaTeX or plain text; what follows #### counts, where there is such a mark.
    choice: the text of the right choice; beside one column with a list of all choices also its letter, or its number
    from 0."""
    choices: tuple[str, ...] | None = Field(default=None, min_length=1)
    """choice: the columns of the wrong choices, or one column that holds a list of all choices."""
    prompt: str | None = None
    """What the model is asked, with {problem} in the place of the problem and {choices} in that of the choices, which
    are written `A) ...`, one a line."""
    grade: GradeBy | None = None
    """math: equal as mathematics (math-verify). choice: by the letter."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        if prompt is not None and PROBLEM not in prompt:
            raise ValueError(f"has no {PROBLEM}, which each problem takes the place of")
        return prompt


class Task(NamedTuple):
    """A task, each of its settings resolved."""

    name: str | None  # of a shipped one
    path: str | None  # None: made by evaluate/arithmetic.py
    revision: str | None
    subset: str | None
    split: str | None
    problem: str
    answer: str
    choices: tuple[str, ...]
    prompt: str
    grade: GradeBy

    @property
    def source(self) -> Source | None:
        """Where the rows are, as the readers of text take it; None where the problems are made."""
        if self.path is None:
            return None
        named: dict[str, Any] = {"revision": self.revision, "subset": self.subset, "split": self.split}
        given = {name: value for name, value in named.items() if value is not None}
        return Source(name="benchmark", path=self.path, rows="text", share=1, **given)


def _on_hub(path: str, revision: str, split: str, problem: str = "problem", answer: str = "answer") -> Task:
    return Task(None, path, revision, None, split, problem, answer, (), PROMPTS["math"], "math")


TASKS: dict[str, Task] = {
    "aime-2024": _on_hub("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train"),
    "aime-2025": _on_hub("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test"),
    ARITHMETIC: Task(None, None, None, None, None, "", "", (), PROBLEM, "math"),
    "gpqa-diamond": _on_hub(
        "Idavidrein/gpqa", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", "train", "Question", "Correct Answer"
    )._replace(
        subset="gpqa_diamond",
        choices=tuple(f"Incorrect Answer {number}" for number in (1, 2, 3)),
        prompt=PROMPTS["choice"],
        grade="choice",
    ),
    "gsm8k": _on_hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "test", problem="question")._replace(
        subset="main"
    ),
    "math-500": _on_hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test"),
}


def task_of(task: str | None, source: TaskSource, setting: str = "benchmark") -> Task:
    """A shipped task with what differs, or, with `task` None, a set of one's own; `setting` is its section.

    Raises UserError for an unknown name, and for settings that are missing or do not go together.
    """
    given = {name: value for name in TaskSource.model_fields if (value := getattr(source, name)) is not None}
    if task is None:
        if missing := [name for name in ("path", "problem", "answer", "grade") if name not in given]:
            raise UserError(
                f"{setting}.source.{missing[0]}: null: a set of one's own (task: null) needs path, problem, answer and "
                f"grade; set it, or name a task: {', '.join(TASKS)}"
            )
        base = _on_hub("", "", "")._replace(revision=None, split=None, prompt=PROMPTS[given["grade"]])
    elif task in TASKS:
        base = TASKS[task]._replace(name=task)
    else:
        close = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TASKS)}"
        raise UserError(f"{setting}.task: {task!r}: no such task; {hint}; null takes benchmark.source alone")
    if base.path is None and task is not None and (other := [name for name in given if name != "prompt"]):
        raise UserError(
            f"{setting}.source.{other[0]}: {given[other[0]]!r}: the problems of {task} are made here, and only the "
            "prompt is a setting; leave it out, or set task: null"
        )
    if "path" in given and task is not None:  # the same set, kept elsewhere
        base = base._replace(revision=None, **({"subset": None, "split": None} if is_local(given["path"]) else {}))
    return _checked(base._replace(**given), setting)


def _checked(task: Task, setting: str) -> Task:
    if task.grade == "choice" and not task.choices:
        raise UserError(
            f"{setting}.source.choices: null: grade: choice needs the columns of the choices; set choices, or "
            "grade: math"
        )
    if task.grade == "math" and task.choices:
        raise UserError(f"{setting}.source.choices: {', '.join(task.choices)}: go with grade: choice alone")
    if task.grade == "choice" and CHOICES not in task.prompt:
        raise UserError(f"{setting}.source.prompt: has no {CHOICES}, which the choices take the place of")
    return task
