"""Grades against a table made by hand, and answers that would hang or kill whoever reads them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluate import math_answers
from evaluate.grading import Grade, grade
from evaluate.math_answers import MathReader, last_box
from evaluate.task_config import TaskSource, task_of
from evaluate.tasks import Problem

MATH, CHOICE = task_of("math-500", TaskSource()), task_of("gpqa-diamond", TaskSource())
CITIES = ("Paris", "London", "Rome", "A port, (B) for short")
# right answer, what the model wrote, what it says, whether that is right
MATH_TABLE = [
    (r"\frac{1}{2}", r"So it is \boxed{\frac{1}{2}}.", "1/2", True),
    (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}", "1/2", True),
    (r"\frac{1}{2}", "so 0.5", "1/2", True),
    (r"\frac{1}{2}", "The answer is 1/2", "1/2", True),
    (r"\frac{1}{2}", r"\boxed{\tfrac12}", "1/2", True),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{1}}", "2", False),
    (r"\frac{1}{3}", "0.33", "33/100", False),
    (r"\frac{1}{3}", r"\boxed{0.3333333}", "1/3", True),
    (r"3\frac{1}{2}", r"\boxed{3.5}", "7/2", True),
    ("-0.5", r"\boxed{-\frac{1}{2}}", "-1/2", True),
    ("1,080", "She earns $1,080.", "1080", True),
    ("1080", r"\boxed{1,080}", "1080", True),
    ("1000", r"\boxed{10^3}", "1000", True),
    ("204", "#### 204", "204", True),
    ("023", r"\boxed{23}", "23", True),
    ("18", r"\boxed{18\text{ dollars}}", "18", True),
    ("18", "He makes 18 dollars every day.", "18", True),
    ("18", "He makes $18.", "18", True),
    (r"90^\circ", r"\boxed{90}", "90", True),
    (r"10\%", r"\boxed{10\%}", "1/10", True),
    (r"10\%", r"\boxed{0.1}", "1/10", True),
    (r"11\sqrt2", r"$\boxed{11\sqrt{2}}$", "11*sqrt(2)", True),
    (r"11\sqrt2", r"$\boxed{\sqrt{242}}$", "11*sqrt(2)", True),
    (r"(3,\frac{\pi}{2})", r"\[\boxed{\left(3, \frac{\pi}{2}\right)}\]", "(3, pi/2)", True),
    (r"(3,\frac{\pi}{2})", r"\[\boxed{\left(\frac{\pi}{2}, 3\right)}\]", "Interval.open(pi/2, 3)", False),
    ("3, 5, 7", r"\boxed{7,5,3}", "{3, 5, 7}", True),
    ("p - q", r"\boxed{-q+p}", "p - q", True),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", "x**2 + 2*x + 1", True),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", "evelyn", True),
    ("5", r"First \boxed{3}, but then \boxed{5}.", "5", True),
    ("3", r"\boxed{3}, and, no, \boxed{5}", "5", False),
    ("5", r"\boxed{5} and, cut off, \boxed{7", "5", True),
    ("5", r"\boxed{\boxed{5}}", "5", True),
    ("5", r"The answer is 7, so \boxed{5} it is, not 9.", "5", True),
    ("-4", "x = -4", "-4", True),
    ("2", "12 - 10 = 2, so the answer is 2.", "2", True),
    ("3", "25 apples and 3 pears", "3", True),
    ("42", "The answer is:\n\n42", "42", True),
    ("42", "**42**", "42", True),
    ("10^{5000}", r"\boxed{10^{5000}}", "10^{5000}", True),  # more digits than Python writes
    ("6", "I cannot tell", None, False),
    ("6", "", None, False),
    ("6", "  \n", None, False),
    ("6", r"\boxed{}", None, False),
    ("6", r"6 \boxed{ }", None, False),
]
CHOICE_TABLE = [
    ("B", "(B)", "B", True),
    ("B", "B.", "B", True),
    ("B", r"\boxed{B}", "B", True),
    ("B", r"\boxed{\text{(B)}}", "B", True),
    ("B", r"\boxed{B) London}", "B", True),
    ("B", r"\[\boxed{\mathbf{b}}\]", "B", True),
    ("B", "the answer is b", "B", True),
    ("B", "C is not correct. B is the correct one.", "B", True),
    ("B", "B is correct, and C is right.", None, False),
    ("B", "**Answer:** (B)", "B", True),
    ("B", "Option B is right, as A is not.", "B", True),
    ("B", "The answer is A. No, the answer is B.", "B", True),
    ("B", "London.", "B", True),
    ("A", "the answer is a city", None, False),
    ("A", "The answer is Amsterdam", None, False),
    ("B", "A or B", None, False),
    ("B", "The answer is A or B.", None, False),
    ("B", "(A) is wrong, so (B)", None, False),
    ("B", r"\boxed{C}, not B", "C", False),
    ("B", r"\boxed{E}", None, False),
    ("D", r"\boxed{A port, (B) for short}", "D", True),
    ("B", "", None, False),
]


def test_the_table_has_sixty_answers():
    assert len(MATH_TABLE) + len(CHOICE_TABLE) >= 60


@pytest.mark.parametrize(("right", "text", "parsed", "correct"), MATH_TABLE)
def test_answers_of_mathematics(right, text, parsed, correct):
    assert grade(MATH, Problem("0", "?", right), text) == Grade(parsed, correct)


@pytest.mark.parametrize(("right", "text", "parsed", "correct"), CHOICE_TABLE)
def test_chosen_letters(right, text, parsed, correct):
    assert grade(CHOICE, Problem("0", "?", right, CITIES), text) == Grade(parsed, correct)


def test_a_choice_of_mathematics_is_known_by_its_text():
    problem = Problem("0", "?", "B", ("$x_1$", r"\(x_2\)"))
    assert grade(CHOICE, problem, r"\boxed{x_2}") == Grade("B", True)
    assert grade(CHOICE, problem, "$x_1$.") == Grade("A", False)


@pytest.mark.parametrize("text", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{100000000!}", "9^9^9^9"])
def test_an_answer_that_never_ends_is_none_and_the_next_one_is_read(text):
    reader = MathReader(seconds=0.3)
    assert reader.grade("3", text) == (None, False)
    assert reader.grade("3", r"\boxed{3}") == ("3", True)
    reader.close()


def test_an_answer_beyond_what_a_process_may_take_is_none():
    reader = MathReader()
    deep = "{" * 300_000 + "}" * 300_000
    assert reader.grade("3", rf"\boxed{{{deep}}}") == (None, False)
    assert reader.grade("3", "(" * 100_000 + "3") == (None, False)
    assert reader.grade("3", "1" * 100_000).correct is False
    assert reader.grade("3", "3").correct
    reader.close()


def test_a_reader_that_was_killed_is_started_again():
    reader = MathReader()
    assert reader.grade("3", "3").correct
    os.kill(reader._process.pid, signal.SIGKILL)
    reader._process.wait()
    assert reader.grade("3", "3").correct
    reader.close()


def test_a_reader_that_dies_as_it_is_asked_is_none_and_the_next_one_is_read():
    reader = MathReader()
    assert reader.grade("3", "3").correct
    reader._process.kill()
    reader._process.wait()
    reader._process.poll = lambda: None  # it died since
    assert reader.grade("3", "3") == (None, False)
    assert reader.grade("3", "3") == ("3", True)
    reader.close()


def test_a_reader_that_does_not_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such parser')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^math-verify does not start: ImportError: no such parser$"):
        MathReader().grade("3", "3")


def test_a_fork_has_a_reader_of_its_own():
    """A fork that is killed between question and reply would leave its reply to who asks next."""
    reader = MathReader()
    assert reader.grade("3", "3").correct

    def ask_and_die() -> None:
        reader.grade("4", "4")
        reader._process.stdin.write(json.dumps(["5", "5"]) + "\n")
        reader._process.stdin.flush()
        os._exit(0)

    fork = multiprocessing.get_context("fork").Process(target=ask_and_die)
    fork.start()
    fork.join()
    assert reader.grade("3", "7") == ("7", False)
    reader.close()


def test_a_reply_that_nobody_read_is_not_the_next_ones(monkeypatch):
    reader = MathReader()
    assert reader.grade("3", "3").correct

    pipes = iter([math_answers._pipe] * 2)  # to write and to flush

    def interrupted(pipe):
        """Ctrl-C while the reply is waited for."""
        try:
            return next(pipes)(pipe)
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patch:
        patch.setattr(math_answers, "_pipe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.grade("5", "5")
    assert reader.grade("3", "7") == ("7", False)
    reader.close()


def test_the_reader_goes_with_who_asks(tmp_path):
    """From another working directory with an `evaluate` of its own, and nothing is left behind."""
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/__init__.py").write_text("raise ValueError('the wrong one')")
    root = Path(math_answers.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from evaluate.math_answers import MathReader\n"
        "reader = MathReader(); print(reader.grade('1/2', '0.5').correct, reader._process.pid)"
    )
    said = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    correct, pid = said.stdout.split()
    assert correct == "True"
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the reader is left behind")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{\frac{1}{2}} b", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"} {\boxed{5} {", "5"),
        (r"\boxed {6}", "6"),
        (r"\boxed{5", None),
        (r"\boxed{" * 50_000 + "5}", "5"),
        ("5", None),
    ],
)
def test_the_last_box_that_is_closed(text, box):
    assert last_box(text) == box
