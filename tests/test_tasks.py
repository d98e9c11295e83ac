"""Tasks: what the settings say, and problems from files of the same form as the shipped sets."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from evaluate.arithmetic import questions
from evaluate.task_config import PROMPTS, TASKS, TaskSource, task_of
from evaluate.tasks import LETTERS, load_problems
from harvest.files import UserError

# A row of each shipped set, with all of its columns.
GSM8K = {"question": "A baker sells 3 pies at $5. How much?", "answer": "3*5=<<3*5=15>>15\n#### 1,015"}
MATH_500 = {
    "problem": "Convert the point $(0,3)$ to polar coordinates.",
    "solution": "We have that $r = 3$.",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
AIME_2024 = {"id": 60, "problem": "Find $t$.", "solution": "$t=4$", "answer": "204", "url": "u", "year": "2024"}
AIME_2025 = {"problem": "Find the sum.", "answer": "70", "id": "0"}
GPQA = {
    "Question": "Which one? {choices}",
    "Correct Answer": "the right one\n",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "Record ID": "rec0",
}
ROWS = {"gsm8k": GSM8K, "math-500": MATH_500, "aime-2024": AIME_2024, "aime-2025": AIME_2025, "gpqa-diamond": GPQA}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own(path, **given):
    return task_of(None, TaskSource(**{"path": path, "problem": "q", "answer": "a", "grade": "math"} | given))


def numbered(tmp_path, count=20):
    return own(lines(tmp_path / "set.jsonl", [{"q": f"question {n}", "a": n} for n in range(count)]))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_shipped_set_is_read_from_a_file_of_its_form(tmp_path, name, form):
    path = str(tmp_path / f"set.{form}")
    if form == "jsonl":
        lines(tmp_path / "set.jsonl", [ROWS[name]])
    else:
        pq.write_table(pa.Table.from_pylist([ROWS[name]]), path)
    task = task_of(name, TaskSource(path=path))
    (problem,) = load_problems(task, 0, None)
    if name == "gpqa-diamond":
        assert sorted(problem.choices) == ["the right one", "wrong 1", "wrong 2", "wrong 3"]
        assert problem.choices[LETTERS.index(problem.answer)] == "the right one"
        listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", problem.choices, strict=True))
        asked = PROMPTS["choice"].replace("{choices}", listed).replace("{problem}", "Which one? {choices}")
    else:
        right = {"gsm8k": "1,015", "math-500": "\\left( 3, \\frac{\\pi}{2} \\right)"}
        assert problem.answer == right.get(name, ROWS[name]["answer"])
        text = ROWS[name]["question" if name == "gsm8k" else "problem"]
        asked = f"{text}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    assert problem.prompt == asked
    assert problem.id == "0"


@pytest.mark.parametrize("name", ROWS)
def test_a_shipped_set_is_asked_for_at_its_commit(monkeypatch, name):
    asked = {}

    def load_dataset(path, **how):
        asked.update(how, path=path)
        return datasets.Dataset.from_list([ROWS[name]])

    monkeypatch.setattr("harvest.sources.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS[name]
    assert len(load_problems(task_of(name, TaskSource()), 0, None)) == 1
    assert len(task.revision) == 40
    assert asked == {"path": task.path, "name": task.subset, "revision": task.revision, "split": task.split}


def test_a_gated_set_says_what_to_do(monkeypatch):
    def load_dataset(*_arguments, **_more):
        raise DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.")

    monkeypatch.setattr("harvest.sources.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"benchmark\.source\.path: 'Idavidrein/gpqa': a gated data set: .*HF_TOKEN"):
        load_problems(task_of("gpqa-diamond", TaskSource()), 0, None)


def test_more_problems_begin_with_the_same_and_the_seed_decides(tmp_path):
    task = numbered(tmp_path)
    few, many, others = load_problems(task, 3, 5), load_problems(task, 3, None), load_problems(task, 4, None)
    assert few == many[:5]
    assert many != others
    assert sorted(many) == sorted(others)
    for problem in many:
        assert problem.prompt.startswith(f"question {problem.id}\n")
        assert problem.answer == problem.id


def test_choices_are_shuffled_by_seed_and_row_alone(tmp_path):
    rows = [{"q": f"q{n}", "a": "right", "w1": "x", "w2": "y", "w3": "z"} for n in range(200)]
    given = {"choices": ("w1", "w2", "w3"), "grade": "choice"}
    task = own(lines(tmp_path / "set.jsonl", rows), **given)
    found = load_problems(task, 0, None)
    places = [LETTERS.index(problem.answer) for problem in found]
    assert all(problem.choices[place] == "right" for problem, place in zip(found, places, strict=True))
    assert all(places.count(place) > 30 for place in range(4))
    fewer = own(lines(tmp_path / "fewer.jsonl", rows[:50]), **given)
    by_id = {problem.id: problem for problem in found}
    assert all(by_id[problem.id] == problem for problem in load_problems(fewer, 0, None))


@pytest.mark.parametrize("answer", ["red", "C", 2])
def test_one_column_may_hold_all_choices(tmp_path, answer):
    rows = [{"q": "Which?", "a": answer, "all": ["blue", "green", "red"]}]
    task = own(lines(tmp_path / "set.jsonl", rows), choices=("all",), grade="choice")
    (problem,) = load_problems(task, 5, None)
    assert problem.choices[LETTERS.index(problem.answer)] == "red"


def test_arithmetic_is_right_and_needs_no_source():
    task = task_of("arithmetic", TaskSource(prompt="Please: {problem}"))
    found = load_problems(task, 7, 40)
    assert len({problem.prompt for problem in found}) == 40
    assert all(eval(problem.prompt[len("Please: What is ") : -1]) == int(problem.answer) for problem in found)
    assert len(load_problems(task, 7, None)) == len(set(questions())) == 162
    assert {"+", "*"} <= set("".join(problem.prompt for problem in found))


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("math500", {}, r"benchmark\.task: 'math500': no such task; did you mean 'math-500'\?"),
        ("poetry", {}, "no such task; there are aime-2024, .*gsm8k"),
        (None, {"path": "x.jsonl", "problem": "q"}, r"benchmark\.source\.answer: null: .*needs path, problem, answer"),
        ("arithmetic", {"path": "x.jsonl"}, r"benchmark\.source\.path: 'x.jsonl': the problems of arithmetic are made"),
        ("gsm8k", {"grade": "choice"}, r"benchmark\.source\.choices: null: grade: choice needs the columns"),
        ("gsm8k", {"choices": ("x",)}, r"benchmark\.source\.choices: x: go with grade: choice alone"),
        ("gpqa-diamond", {"prompt": "{problem}"}, r"benchmark\.source\.prompt: has no \{choices\}"),
    ],
)
def test_settings_that_make_no_task(task, given, message):
    with pytest.raises(UserError, match=message):
        task_of(task, TaskSource(**given))


def test_a_prompt_has_a_place_for_the_problem():
    with pytest.raises(ValueError, match=r"prompt\n.*has no \{problem\}"):
        TaskSource(prompt="Solve it")


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([{"q": "1?"}], {}, r"benchmark\.source\.answer: 'a': the data set has no such column; it has q"),
        (
            [{"q": "1?", "answers": "1"}],
            {"answer": "answer"},
            r"source\.answer: 'answer': .* did you mean 'answers'\?",
        ),
        (
            [{"q": "1?", "a": "1"}, {"q": "2?", "a": " "}],
            {},
            r"source\.answer: .*set.jsonl, line 2: column 'a' is empty",
        ),
        ([{"q": None, "a": "1"}], {}, r"source\.problem: .*line 1: column 'q' is empty"),
        ([{"q": "1?", "a": ["1"]}], {}, r"column 'a' holds \['1'\]; text or a number is needed"),
        ([{"q": "1 \ud800?", "a": "1"}], {}, r"source\.problem: .*set.jsonl, line 1: column 'q' is not UTF-8 text"),
        ([{"q": "1?", "a": "so #### "}], {}, r"source\.answer: .*column 'a' has nothing behind ####"),
        (
            [{"q": "1?", "a": "E", "c": ["x", "y"]}],
            {"choices": ("c",), "grade": "choice"},
            r"source\.answer: .*'E' is none of the 2 choices",
        ),
        (
            [{"q": "1?", "a": "x", "c": "x"}],
            {"choices": ("c",), "grade": "choice"},
            r"source\.choices: .*2 choices; 2 to 26 are needed, all different",
        ),
    ],
)
def test_rows_that_make_no_problem(tmp_path, rows, given, message):
    task = own(lines(tmp_path / "set.jsonl", rows), **given)
    with pytest.raises(UserError, match=message):
        load_problems(task, 0, None)


def test_damaged_lines_and_too_few_problems_are_errors(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"q": "1?", "a": "1"}\n{"q": "2?", \n')
    with pytest.raises(UserError, match=r"source\.path: .*line 2: not valid JSON"):
        load_problems(own(str(path)), 0, None)
    with pytest.raises(UserError, match=r"benchmark\.problems: 21: .*set.jsonl has 20; lower it, or set null for all"):
        load_problems(numbered(tmp_path), 0, 21)
    with pytest.raises(UserError, match=r"benchmark\.problems: 163: arithmetic has 162"):
        load_problems(task_of("arithmetic", TaskSource()), 0, 163)
