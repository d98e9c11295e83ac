"""The answers of a benchmark: a line of JSON each, appended as it ends, and found again by what decides it.

attempts-<rank>.jsonl    what each worker has answered, in the order in which answers ended
attempts.jsonl           all of them with their marks, in the order of condition, problem and sample; written at the
                         end, when the others go

A line has `key`, sha256 of all that decides the answer: the model's files, the tokens of the prompt, what is done to
which features of which SAE, sampling, seed, and what changes last bits. So it counts wherever the same is asked.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from evaluate.journal import Journal, read_lines
from evaluate.operations import Operation
from harvest.files import replacing

ANSWERS, JOURNALS = "attempts.jsonl", "attempts-*.jsonl"


class Condition(NamedTuple):
    """What is done while problems are answered."""

    name: str  # of its own, as "feature 12 add 2"
    operations: tuple[Operation, ...]  # none: the model as it is
    group: Literal["none", "feature", "control"]
    of: int | None = None  # of a control: number of the feature's condition that it is beside


class Attempt(NamedTuple):
    """One answer to one problem in one condition."""

    condition: int
    problem: int
    sample: int
    text: str  # thinking included
    tokens: int  # written, without the one that ends it
    thinking_tokens: int | None  # of these, up to </think>; None where it cannot be known
    ended: bool  # before max_new_tokens
    processed: int  # positions that the model read
    changed: int  # of these, where an operation was done


class Place(NamedTuple):
    """Which answer: numbers of its condition, problem and sample."""

    condition: int
    problem: int
    sample: int


def answer_keys(
    shared: Sequence[Any], conditions: Sequence[Any], prompts: Sequence[Sequence[int]], samples: int, seed: int
) -> dict[Place, str]:
    """The key of every answer. `shared` decides all of them, each of `conditions` its own, beside the prompt's tokens.

    All of it is JSON.
    """
    first = _digest(shared)
    of_condition, of_prompt = [_digest([first, each]) for each in conditions], [_digest(list(ids)) for ids in prompts]
    return {
        Place(c, p, s): _digest([condition, prompt, seed, p, s])
        for c, condition in enumerate(of_condition)
        for p, prompt in enumerate(of_prompt)
        for s in range(samples)
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_answers(directory: Path) -> dict[str, Attempt]:
    """All answers in a run's directory by key, whoever wrote them; a last line that is not whole is passed over.

    Raises UserError for a damaged line.
    """
    found: dict[str, Attempt] = {}
    # attempts.jsonl last: it is whole before the others go, so what vanishes meanwhile is in it.
    for path in [*sorted(directory.glob(JOURNALS)), directory / ANSWERS]:
        for line in read_lines(path, ("key", *Attempt._fields), "its problem is answered anew"):
            found[line["key"]] = Attempt(**{name: line[name] for name in Attempt._fields})
    return found


def journal_of(directory: Path, rank: int) -> Journal:
    """What a worker has answered, to append to."""
    return Journal(directory / JOURNALS.replace("*", str(rank)))


def line_of(key: str, attempt: Attempt) -> dict[str, Any]:
    """An answer as a line of a journal."""
    return {"key": key, **attempt._asdict()}


def write_answers(directory: Path, answers: Iterable[dict[str, Any]]) -> None:
    """Write attempts.jsonl, and take the journals away."""
    with replacing(directory / ANSWERS) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in answers)
    for path in directory.glob(JOURNALS):
        path.unlink(missing_ok=True)
