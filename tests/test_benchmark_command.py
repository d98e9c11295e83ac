"""What `pipeline benchmark` refuses, and how other commands see its directory."""

import shutil

import pytest
from conftest import only, pipeline
from test_benchmark import ANSWERS, SETTINGS, asked, folder, lines, of, refused, results, run  # noqa: F401 - fixtures
from tiny import write_jsonl

from evaluate import benchmark
from evaluate.tasks import Problem
from harvest.files import read_json


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("benchmark.features=[500]", "benchmark.features: 500: the SAE has 128 features, 0 to 127"),
        ("benchmark.features=[1,1]", "benchmark: features: names 1 twice"),
        ("benchmark.task=arithmetics", "benchmark.task: 'arithmetics': no such task; did you mean 'arithmetic'?"),
        ("benchmark.task=null", "benchmark.source.path: null: a set of one's own (task: null) needs path"),
        ("benchmark.hook=model.layers.7", "benchmark.hook: 'model.layers.7': no such hook; one of model.layers.1"),
        ("benchmark.strengths=[1e7]", "strengths: 1e+07: a strength is a number from -1e+06 to 1e+06"),
        ("benchmark.strengths=[]", "benchmark.strengths"),
        ("benchmark.temperature=0", "samples: 2: at temperature 0 all answers to a problem are the same"),
        ("benchmark.max_new_tokens=500", "benchmark.max_new_tokens: 500: prompt 1 of 5 has"),
        ("benchmark.chat=true", "benchmark.chat: true: this model's tokenizer has no chat template"),
        ("benchmark.where=[thinking,prompt]", None),
        ("benchmark.where=[everywhere]", "benchmark.where.0: 'everywhere'"),
        ("benchmark.threads=99", "benchmark.threads: 99: this machine has"),
        ("evaluate.features=null", "evaluate.features: null: benchmark reads what it writes"),
        ("evaluate.batch_rows=64", "benchmark: the evaluate stage for these settings is not complete"),
        ("benchmark.strength=2", "benchmark.strength: unknown setting; did you mean 'strengths'?"),
    ],
)
def test_what_cannot_be_is_said(folder, asked, setting, says):  # noqa: F811
    if says is None:
        run(setting)
        assert asked()
        return
    said = refused(setting)
    assert says in said and "Traceback" not in said
    assert not asked()


def test_a_problem_without_text_is_said(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(benchmark, "load_problems", lambda *_a, **_o: [Problem("0", " ", "1")])
    assert "prompt 1 of 1 is empty" in refused()


def test_other_commands_know_it(folder, asked):  # noqa: F811
    assert "have no section `benchmark`" in pipeline("path", "benchmark").out
    assert "benchmark would run: it has not been run yet" in pipeline("status", *SETTINGS).out
    run()
    place = of(folder).relative_to(folder)
    assert pipeline("path", "benchmark", *SETTINGS).out.strip() == str(place)
    for settings in (SETTINGS, ()):  # also of settings that have none
        assert f"benchmark complete   {place}" in pipeline("status", *settings).out
    assert "benchmark.samples: 2 -> 3" not in pipeline("status", *SETTINGS).out
    assert "samples: 2 -> 3" in pipeline("status", *SETTINGS, "benchmark.samples=3").out
    assert "nothing to delete" in pipeline("prune", "--yes").out
    assert pipeline("run").status == 0
    report = (place / "report.html").read_text()
    page = only(folder, "runs/evaluate/*/features/*/index.html")
    assert f"../../{page.relative_to(folder / 'runs')}" in report
    written = read_json(place / "begun.json")
    assert written["settings"]["samples"] == 2 and "runtime" not in written["settings"]
    assert written["inputs"].keys() >= {"model", "tokenizer", "generation"}
    shutil.rmtree(only(folder, "runs/evaluate/*"))
    assert f"deleted  {place}" in pipeline("prune", "--yes").out


def test_what_is_damaged_is_made_anew_from_the_answers(folder, asked):  # noqa: F811
    run()
    whole, place = results(folder), of(folder).relative_to(folder)
    (place / "metrics.json").write_text("{}")
    ran = pipeline("verify", *SETTINGS)
    assert ran.status == 1
    assert f"{place}/metrics.json: missing, or changed since the stage ended" in ran.out
    assert "`make benchmark` makes it anew, from the answers that it has" in ran.out
    assert "benchmark would start over" in pipeline("status", *SETTINGS).out
    count = asked().total()
    assert "is made anew" in run()
    assert asked().total() == count and results(folder) == whole
    taken = (place / "attempts.jsonl").read_text().splitlines(keepends=True)
    (place / "attempts.jsonl").write_text("".join(taken[:20] + taken[21:]))
    run()
    assert asked().total() == count + 1 and results(folder) == whole
    (place / "attempts.jsonl").write_text("".join([*taken[:20], "{}\n", *taken[21:]]))
    ran = pipeline("benchmark", *SETTINGS)
    assert f"{place}/attempts.jsonl: line 21 is damaged; delete it" in ran.out


def test_problems_of_ones_own_count_by_content(folder, asked):  # noqa: F811
    rows = [{"question": f"What is {number} and one?", "solution": str(number + 1)} for number in range(5)]
    write_jsonl(folder / "own.jsonl", rows)
    source = "benchmark.source={path: own.jsonl, problem: question, answer: solution, grade: math}"
    run("benchmark.task=null", source)
    directory = of(folder)
    (folder / "elsewhere").mkdir()
    (folder / "own.jsonl").rename(folder / "elsewhere/own.jsonl")
    moved = source.replace("own.jsonl", "elsewhere/own.jsonl")
    assert "complete" in run("benchmark.task=null", moved)
    assert read_json(directory / "begun.json")["inputs"]["task"].startswith("sha256:")
    count = asked().total()
    write_jsonl(folder / "elsewhere/own.jsonl", [{**rows[0], "question": "What else?"}, *rows[1:]])
    run("benchmark.task=null", moved)
    assert len(list(folder.glob("runs/benchmark/*"))) == 2
    assert asked().total() == count + ANSWERS // 5  # of the one problem that is new
    said = refused_of_own("benchmark.task=null", moved.replace("question", "questions"))
    assert "benchmark.source.problem: 'questions': the data set has no such column; did you mean 'question'?" in said
    assert "benchmark.source.path: 'own.jsonl'" in refused_of_own("benchmark.task=null", source)


def refused_of_own(*settings: str) -> str:
    ran = pipeline("benchmark", *SETTINGS, *settings)
    assert ran.status == 1, ran.out
    return " ".join(ran.out.split())


def test_a_benchmark_of_the_model_as_it_is_needs_no_feature(folder, asked):  # noqa: F811
    run("benchmark.best_features=0")
    assert {line["condition"] for line in lines(folder)} == {0}
    assert len(asked()) == 10
    run()
    assert len(asked()) == 50


def test_anew_by_force_or_with_other_workers(folder, asked, monkeypatch):  # noqa: F811
    run()
    count = asked().total()
    run("--force", "--yes")
    assert asked().total() == 2 * count
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "benchmark --force: one of several workers" in pipeline("benchmark", *SETTINGS, "--force", "--yes").out


def test_settings_without_a_section_take_the_defaults(folder, asked):  # noqa: F811
    ran = pipeline("benchmark")
    assert ran.status == 1
    assert "benchmark: arithmetic, 162 problems, 4 samples, 9 conditions (none; feature " in ran.out
    assert "with 1,024 new ones that is more than the model's 128 positions" in ran.out
    assert not asked()
