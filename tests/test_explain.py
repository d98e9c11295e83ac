"""`pipeline explain` against an endpoint on loopback: an oracle, one that fails, one that is hostile."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
from conftest import contents, current_copy, only, pipeline, start
from oracle_server import MODEL, Said, serving
from oracles import oracle
from planted import COUNT, EVALUATED, HOOK, plant

from evaluate import asking
from evaluate.figures import read_figures
from harvest.files import read_json

HOSTILE = '<img src=x onerror="window.broken=1">\u001b[31m\u202e'


@pytest.fixture(scope="session")
def planted(finished, tmp_path_factory):
    """A folder with an evaluated SAE of planted features; read only."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    shutil.copytree(finished, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plant(folder)
        ran = pipeline("evaluate", *EVALUATED)
        assert ran.status == 0, ran.out
    return folder


@pytest.fixture
def folder(planted, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    return current_copy(planted, tmp_path / "copy", monkeypatch)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.05)


def options(server, *arguments: str) -> list[str]:
    return ["explain", "--base-url", server.url, "--model", MODEL, *EVALUATED, "explain.tokens=8", *arguments]


def explain(server, *arguments: str) -> str:
    ran = pipeline(*options(server, *arguments))
    assert ran.status == 0, ran.out
    return ran.out


def run_of(folder):
    return only(folder, "runs/explain/*")


def explains_by(answer):
    """Whatever it is asked to explain, it says this; else it is the oracle."""
    return lambda messages: answer if "one JSON object" in messages[0]["content"] else oracle(messages)


def entries(folder) -> list[dict]:
    return read_json(run_of(folder) / f"explanations-{HOOK}.json")["features"]


def results(folder) -> dict[str, bytes]:
    """What does not tell of the time or of the order of answers."""
    found = contents(run_of(folder))
    for name in ("begun.json", "manifest.json", "progress.json", "calls.jsonl"):
        found.pop(name, None)
    return {name: data for name, data in found.items() if "/.lock" not in f"/{name}"}


def test_an_oracle_is_believed_and_another_s_explanation_is_not(folder):
    before = contents(folder / "runs/evaluate")
    with serving(oracle) as server:
        out = explain(server)
        assert set(server.answered.values()) == {1}
        assert f"10 features, {server.answered.total()} calls to oracle at {server.url}" in out
        asked = server.answered.total()
        assert "complete" in explain(server)
        assert server.answered.total() == asked
    assert contents(folder / "runs/evaluate") == before
    found = entries(folder)
    assert [each["feature"] for each in found] == list(range(COUNT))
    for each in found:
        assert each["detection"]["value"] >= 0.9
        assert each["fuzzing"]["value"] >= 0.9
        assert each["problems"] == {}
        assert each["control_of"] != each["feature"]
    for name in ("control", "control_fuzzing"):
        assert np.mean([each[name]["value"] for each in found]) == pytest.approx(0.5, abs=0.1)
    measured = read_figures(run_of(folder)).own(HOOK)
    assert measured.lists["explanations"]["features"] == found
    mean = measured.figure("detection", "explanations")
    assert mean.value == pytest.approx(np.mean([each["detection"]["value"] for each in found]))
    assert mean.interval[0] <= mean.value <= mean.interval[1]
    assert measured.value("l0") == read_figures(only(folder, "runs/evaluate/*")).own(HOOK).value("l0")
    label = found[3]["label"]
    for path in (run_of(folder) / "report.html", run_of(folder) / f"features/{HOOK}/3.html"):
        assert label in path.read_text()
    index = (run_of(folder) / f"features/{HOOK}/index.html").read_text()
    assert f'{label.lower().replace(" ", "·")}"' in index  # as the search asks for it


@pytest.mark.parametrize(
    ("features", "falsify", "more"),
    [(1, "{texts: 9, contexts: 3}", "; up to 5 calls more for counterexamples"), (2, "null", "")],
)
def test_calls_and_tokens_are_said_before_the_first(folder, features, falsify, more):
    """Each explanation is tried on its own feature and, of several, on another's; four characters are a token."""
    lengths = []

    def answer(messages) -> str:
        lengths.append(sum(len(each["content"]) for each in messages))
        letter = "xy"[len(lengths) % 2]
        return json.dumps({"label": letter * 40, "sentence": letter * 120})  # as long as explanations are taken to be

    with serving(answer) as server:
        chosen = [f"--feature={number}" for number in range(1, 1 + features)]
        out = explain(server, *chosen, "--parallel", "1", f"explain.falsify={falsify}")
    asked = lengths[: len(lengths) - (5 if more else 0)]
    assert (
        f"explain: {features} features, {len(asked)} calls to oracle at {server.url}: about {sum(asked) // 4:,} tokens "
        f"to read and {60 * len(asked):,} to write{more}\n"
    ) in out


def test_tests_hold_what_they_say(folder):
    """Contexts of the explaining half are in no test, and silent texts hold no token of the feature."""
    with serving(oracle) as server:
        explain(server)
        bodies = [body["messages"] for _, body in server.requests]
    explaining, testing = [], []
    for messages in bodies[1:]:
        is_explaining = "one JSON object" in messages[0]["content"]
        texts = re.findall(r"^Excerpt \d+.*?: (.*)$", messages[1]["content"], re.MULTILINE)
        (explaining if is_explaining else testing).append(texts)
    assert len(explaining) == COUNT
    assert all(len(texts) <= 8 for texts in testing)
    seen = {re.sub("[«»]", "", text) for texts in explaining for text in texts}
    tested = {re.sub("[«»]", "", text) for texts in testing for text in texts}
    assert len(seen & tested) <= 0.05 * len(tested)  # markers of turns alone come again


@pytest.mark.parametrize("moment", [0.01, 0.15, 0.6])
def test_stopped_and_started_again_no_call_is_made_twice(folder, planted, tmp_path, monkeypatch, moment):
    with serving(oracle) as server:
        explain(server)
        whole, calls = results(folder), server.answered.total()
        server.answered.clear()
        again = current_copy(planted, tmp_path / "again", monkeypatch)
        server.delay_s = 0.01
        process = start(*options(server), cwd=again)
        while server.answered.total() < moment * calls:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode == 130
        assert server.answered.total() < calls
        assert not list(again.glob("runs/explain/*/manifest.json"))
        explain(server)
        assert server.answered.total() == calls
        assert set(server.answered.values()) == {1}
    assert results(again) == whole


def test_killed_and_started_again_the_result_is_the_same(folder, planted, tmp_path, monkeypatch):
    with serving(oracle) as server:
        explain(server)
        whole = results(folder)
        again = current_copy(planted, tmp_path / "again", monkeypatch)
        server.answered.clear()
        server.delay_s = 0.01
        process = start(*options(server), cwd=again)
        while server.answered.total() < 40:
            time.sleep(0.01)
        process.kill()
        process.join()
        with (run_of(again) / "calls.jsonl").open("ab") as journal:
            journal.write(b'{"key": "abc", "te')
        explain(server)
        assert sum(count > 1 for count in server.answered.values()) <= 4  # those under way
    assert results(again) == whole


def test_a_third_of_the_calls_may_fail(folder, planted, tmp_path, monkeypatch):
    with serving(oracle) as server:
        explain(server)
        whole = results(folder)
    again = current_copy(planted, tmp_path / "again", monkeypatch)
    with serving(oracle) as server:
        server.failing, server.late_s = 0.3, 0.3
        explain(server, "explain.runtime.timeout_s=0.2", "explain.runtime.tries=30", "--parallel", "8")
        assert len(server.requests) > 1.2 * server.answered.total()
        assert server.most_under_way > 1
    assert results(again) == whole


def test_what_was_asked_once_is_not_asked_for_other_settings(folder):
    with serving(oracle) as server:
        explain(server, "--feature", "1", "--feature", "2")
        server.answered.clear()
        explain(server, "--feature", "1", "--feature", "2", "--feature", "3")
        first = [json.loads(question)["messages"] for question in server.answered]
        assert sum("one JSON object" in messages[0]["content"] for messages in first) == 1
        assert set(server.answered.values()) == {1}
    assert len(list(folder.glob("runs/explain/*"))) == 2


ANSWERS = {
    "no JSON": ("I will not.", "no JSON object with a label and a sentence"),
    "refused": (Said(None, refusal="no"), "refused"),
    "half": ('{"label": "x"', "no JSON object with a label and a sentence"),
    "other": ('{"label": 3, "sentence": ["x"]}', "no JSON object with a label and a sentence"),
    "deep": ("[" * 5000 + "{" * 5000, "no JSON object with a label and a sentence"),
    "cut": (Said('{"label": "x', finish_reason="length"), "cut off"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_that_cannot_be_used_are_counted(folder, kind):
    answer, problem = ANSWERS[kind]
    with serving(
        lambda messages: answer if "one JSON object" in messages[0]["content"] else oracle(messages)
    ) as server:
        out = explain(server, "--feature", "1", "--feature", "2", "explain.falsify={texts: 9, contexts: 3}")
    assert "explain.falsify: nothing to try: no explained feature was left context-dependent" in out
    for each in entries(folder):
        assert each["label"] == ""
        assert each["detection"] is None
        assert sum(each["problems"].values()) == 1
        assert problem in next(iter(each["problems"]))
    page = (run_of(folder) / f"features/{HOOK}/1.html").read_text()
    assert "No explanation" in page
    assert problem in page


def test_judgements_that_cannot_be_used_are_counted_and_do_not_score(folder):
    count = Counter()

    def answer(messages) -> str:
        count["all"] += 1
        said = oracle(messages)
        return said if "one JSON object" in messages[0]["content"] or count["all"] % 2 else said[:-3]

    with serving(answer) as server:
        explain(server, "--feature", "1", "--feature", "2", "--parallel", "1")
    for each in entries(folder):
        assert each["problems"]
        assert all(re.fullmatch(r"no list of \d zeros and ones", problem) for problem in each["problems"])
        assert each["detection"]["value"] >= 0.9  # those that were read are right
        assert each["detection"]["judged"] < each["examples"]["active"] + each["examples"]["silent"]


def test_hostile_answers_are_text(folder):
    said = json.dumps({"label": HOSTILE, "sentence": f"</script><script>window.broken=1</script>{HOSTILE}"})
    with serving(explains_by(said)) as server:
        out = explain(server, "--feature", "1", "explain.seed=3")
    assert "\x1b" not in out
    for path in (run_of(folder) / "report.html", *run_of(folder).glob("features/*/*.html")):
        html = path.read_text()
        assert "<img" not in html
        assert "<script>window" not in html
        assert not set(html) & {"\x1b", "\u202e"}
    page = (run_of(folder) / f"features/{HOOK}/1.html").read_text()
    assert "&lt;img src=x onerror=" in page
    assert "\\x1b[31m\\u202e" in page


def test_counterexamples_are_looked_for(folder):
    texts = [f"one text of {n} kinds" for n in ("some", "many", "no")]

    def answer(messages) -> str:
        return json.dumps(texts) if "JSON array" in messages[1]["content"] else oracle(messages)

    with serving(answer) as server:
        explain(server, "--feature", "1", "--feature", "2", "--falsify")
        calls = server.answered.total()
        assert "complete" in explain(server, "--feature", "1", "--feature", "2", "--falsify")
        assert server.answered.total() == calls
    tried = read_figures(run_of(folder)).own(HOOK).lists["counterexamples"]
    assert [each["feature"] for each in tried["features"]] == [1, 2]
    assert "one text of some kinds" in (run_of(folder) / f"features/{HOOK}/1.html").read_text()
    assert "Counterexamples" in (run_of(folder) / "report.html").read_text()
