"""Answers of mathematics: found in a text, read and compared by math-verify, in a process of its own.

What a model wrote is untrusted: 9^9^9^9 keeps sympy busy for ever, in Python's own integers, where no signal handler of
Python gets a turn. So the kernel ends the process after some seconds of its own time, which a busy machine does not
shorten, and the answer counts as one that cannot be read; the next one gets a new process (half a second).
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

SECONDS = 5.0  # most answers take milliseconds
BYTES = 4 << 30  # of address space
TAIL = 2000  # characters of an answer without a box that are read: it comes last
LONGEST = 500  # characters of a box, and of what an answer is written as
READY = "ready"
BOX = r"\boxed{"
BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


class MathGrade(NamedTuple):
    """What an answer says, None if it cannot be read, and whether it equals the right one."""

    parsed: str | None
    correct: bool


def last_box(text: str) -> str | None:
    r"""What is in the last \boxed{...} that is closed; None where there is none."""
    opened: list[tuple[bool, int]] = []  # whether a brace is a box's, and where it ends
    found = 0, 0
    for mark in BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != r"\{":
            opened.append((len(mark[0]) > 1, mark.end()))
        elif mark[0] == "}" and opened:
            is_box, start = opened.pop()
            found = max(found, (start, mark.start())) if is_box else found
    return text[slice(*found)] if found[0] else None


class MathReader:
    """The process that reads, started when it is first asked and again after an answer that ended it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """`seconds` of its time that one answer may take."""
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def grade(self, right: str, text: str) -> MathGrade:
        """What `text` answers, against the `right` answer, LaTeX or plain.

        Raises RuntimeError where the process does not start.
        """
        box = last_box(text)
        found = text[-TAIL:] if box is None else f"{BOX}{box}}}" if box.strip() and len(box) <= LONGEST else ""
        if not found.strip():
            return MathGrade(None, False)
        if self._owner != os.getpid():
            self._process = None  # of the process that this one is a fork of
        process = self._process if self._process and self._process.poll() is None else self._start()
        try:
            _pipe(process.stdin).write(json.dumps([right, found]) + "\n")
            _pipe(process.stdin).flush()
            reply = _pipe(process.stdout).readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # Ctrl-C: the reply to this one must not be taken for that to the next
            self.close()
            raise
        if not reply.endswith("\n"):
            self.close()
            return MathGrade(None, False)
        return MathGrade(*json.loads(reply))

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        # In the folder of our packages, whatever the working directory is: Hugging Face has an `evaluate` too.
        command = [sys.executable, "-m", "evaluate.math_answers", str(self._seconds)]
        folder = Path(__file__).parents[1]
        pipe = subprocess.PIPE
        self._owner = os.getpid()
        self._process = process = subprocess.Popen(
            command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8"
        )
        if _pipe(process.stdout).readline().strip() != READY:
            said = process.communicate()[1].strip().splitlines()
            raise RuntimeError(f"math-verify does not start: {said[-1] if said else process.returncode}")
        return process


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _serve(seconds: float) -> None:
    """Answer questions [right, text], a line of JSON each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; this process ends with its questions
    with suppress(ValueError, OSError):  # a lower limit is set, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    _grade("1", "1")  # loads and compiles what the first answer would pay for
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for stream in (1, 2):  # parsers print what they stumble at
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    print(READY, file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
        reply = _grade(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _grade(right: str, text: str) -> MathGrade:
    from math_verify import verify

    answer, own = _read(text), _right(right)
    if not answer:
        return MathGrade(None, False)
    correct = verify(list(own), list(answer), timeout_seconds=None)
    return MathGrade(_written(own if correct else answer), correct)


@cache
def _right(right: str) -> tuple[Any, ...]:
    return _read(f"{BOX}{right}}}")


def _read(text: str) -> tuple[Any, ...]:
    """What math-verify finds: a value of sympy and its text, the text alone if it is no mathematics, or nothing."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.disable()
    first = LatexExtractionConfig(boxed_match_priority=0)
    return tuple(parse(text, (first, ExprExtractionConfig()), parsing_timeout=None))  # pyright: ignore[reportArgumentType]


def _written(found: tuple[Any, ...]) -> str:
    """A text that values which are the same number share: 0.5 and 2/4 are 1/2."""
    from sympy import Float, Rational

    value = found[0]
    try:
        value = value if isinstance(value, str) else value.doit()
        return str(Rational(str(value)) if isinstance(value, Float) else value)[:LONGEST]
    except Exception:  # whatever sympy raises of a value that it cannot evaluate, or an integer beyond Python's limit
        return str(found[-1])[:LONGEST]


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
