"""`pipeline benchmark`: every answer once, whoever gives it, and the same files whatever came between."""

import json
import os
import random
import signal
import time
from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from conftest import contents, current_copy, only, pipeline, start

from evaluate import benchmark, engine, grading
from evaluate.engine import Completion
from evaluate.figures import read_figures
from evaluate.grading import Grade
from evaluate.journal import Journal
from harvest.files import locked, read_json

HOOK = "model.layers.1"
SETTINGS = (
    *("benchmark.problems=5", "benchmark.samples=2", "benchmark.strengths=[0,2,4]", "benchmark.max_new_tokens=6"),
    *("benchmark.best_features=1", "benchmark.slots=4", "benchmark.threads=1", "benchmark.runtime.device=cpu"),
)
ANSWERS = 5 * 2 * 5  # problems, samples; none, and of the feature and its control two strengths each


def answering(asked: Path, delay_s: float = 0.0):
    """A stand-in for the engine: answers hang on the request alone, end in another order, and are noted."""

    def answers(model, tokenizer, interventions, requests, sampling, *, slots, chat):
        assert (slots, sampling.max_new_tokens) == (4, 6)
        for number in sorted(range(len(requests)), key=lambda n: (len(requests) - n) % 3):
            ids, operations, seed = requests[number]
            done = tuple(interventions.lists[operations])
            rng = random.Random(repr((ids, done, seed)))
            with asked.open("a") as file:
                file.write(json.dumps([ids, [list(o) for o in done], seed]) + "\n")
            time.sleep(delay_s)
            written = [rng.randrange(20, 400) for _ in range(rng.randint(1, 6))]
            read = len(ids) + len(written) - 1
            yield number, Completion(tokenizer.decode(written), written, len(written) < 6, read, read * bool(done))

    return answers


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of a finished run as the current folder, and a stand-in for the engine."""
    copy = current_copy(finished, tmp_path / "copy", monkeypatch)
    monkeypatch.setattr(benchmark, "answers", answering(tmp_path / "asked.jsonl"))
    monkeypatch.setattr(benchmark, "grade", lambda task, problem, text: Grade(text[:1] or None, len(text) % 3 == 0))
    return copy


@pytest.fixture
def asked(tmp_path):
    """How often each request was answered."""
    path = tmp_path / "asked.jsonl"
    return lambda: Counter(path.read_text().splitlines()) if path.exists() else Counter()


def run(*settings: str) -> str:
    ran = pipeline("benchmark", *SETTINGS, *settings)
    assert ran.status == 0, ran.out
    return ran.out


def of(folder: Path) -> Path:
    return only(folder, "runs/benchmark/*")


def two_workers(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> list[ForkProcess]:
    """Processes of ranks 0 and 1."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    workers = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        workers.append(start("benchmark", *SETTINGS, cwd=cwd))
    return workers


def results(folder: Path) -> dict[str, bytes]:
    """What does not tell of the time."""
    found = contents(of(folder))
    for name in ("begun.json", "manifest.json", "progress.json"):
        found.pop(name, None)
    return {name: data for name, data in found.items() if "/.lock" not in f"/{name}"}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (of(folder) / "attempts.jsonl").read_text().splitlines()]


def test_every_answer_once_in_order_with_its_mark(folder, asked):
    before = contents(folder / "runs/evaluate")
    out = run()
    assert f"{ANSWERS} answers, {6 * ANSWERS} tokens at most" in out
    assert out.splitlines()[-1] == str(of(folder).relative_to(folder) / "benchmark.html")
    found = lines(folder)
    places = [(each["condition"], each["problem"], each["sample"]) for each in found]
    assert places == [(c, p, s) for c in range(5) for p in range(5) for s in range(2)]
    assert set(asked().values()) == {1} and len(asked()) == ANSWERS
    assert not list(of(folder).glob("attempts-*"))
    assert contents(folder / "runs/evaluate") == before
    conditions = read_figures(of(folder)).own(HOOK).lists["benchmark"]["conditions"]
    assert [each["group"] for each in conditions] == ["none", "feature", "control", "feature", "control"]
    assert [each["of"] for each in conditions] == [None, None, 1, None, 3]
    for number, each in enumerate(conditions):
        own = [line for line in found if line["condition"] == number]
        assert each["pass_at_1"]["value"] == pytest.approx(sum(line["correct"] for line in own) / len(own))
        assert each["tokens"]["value"] == pytest.approx(sum(line["tokens"] for line in own) / len(own))
        assert all((line["changed"] > 0) == (number > 0) for line in own)
    assert "complete" in run()
    assert len(asked()) == ANSWERS


def test_seeds_are_those_of_problem_and_sample(folder, asked):
    run()
    by_condition: dict[str, set[str]] = {}
    for request in asked():
        ids, done, seed = json.loads(request)
        by_condition.setdefault(json.dumps(done), set()).add(json.dumps([ids, seed]))
    assert len(by_condition) == 5
    assert len({frozenset(each) for each in by_condition.values()}) == 1
    assert {tuple(json.loads(each)[1]) for each in by_condition["[]"]} == {
        (0, p, s) for p in range(5) for s in range(2)
    }


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_started_again_nothing_is_lost_or_done_twice(folder, asked, tmp_path, finished, monkeypatch, kill):
    run()
    whole, count = results(folder), len(asked())
    again = current_copy(finished, tmp_path / "again", monkeypatch)
    noted = tmp_path / "again.jsonl"
    monkeypatch.setattr(benchmark, "answers", answering(noted, 0.01))
    for _ in range(3):
        process = start("benchmark", *SETTINGS, cwd=again)
        before = len(noted.read_text().splitlines()) if noted.exists() else 0
        while process.is_alive() and (not noted.exists() or len(noted.read_text().splitlines()) < before + 6):
            time.sleep(0.005)
        os.kill(process.pid, kill)
        process.join()
        assert process.exitcode == (130 if kill == signal.SIGINT else -9)
    assert not list(again.glob("runs/benchmark/*/manifest.json"))
    with (of(again) / "attempts-0.jsonl").open("ab") as journal:
        journal.write(b'{"key": "abc", "te')
    assert "are there from before" in run()
    assert results(again) == whole
    done = Counter(noted.read_text().splitlines())
    assert len(done) == count and done.total() <= count + 3  # those under way


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
def test_workers_share_the_problems_and_the_last_one_ends(folder, asked, finished, tmp_path, monkeypatch, order):
    run()
    whole, count = results(folder), len(asked())
    current_copy(finished, tmp_path / "again", monkeypatch)
    (tmp_path / "asked.jsonl").unlink()
    world = str(len(order))
    monkeypatch.setenv("WORLD_SIZE", world)
    if order[0]:
        monkeypatch.setenv("RANK", "1")
        assert "worker 0 has not begun it for 0s (benchmark.runtime.wait_seconds)" in refused(
            "benchmark.runtime.wait_seconds=0"
        )
        begin_as_worker_0(monkeypatch)
    for number, rank in enumerate(order):
        monkeypatch.setenv("RANK", str(rank))
        last = number == len(order) - 1
        if last:
            with locked(of(tmp_path / "again"), benchmark.ENDING):
                assert "every answer is there; another worker grades them" in run()
            assert not list(Path("runs/benchmark").glob("*/manifest.json"))
        out = run()
        assert ("benchmark complete" in out) == out.rstrip().endswith("benchmark.html") == last
        assert ("start it again, with any number of workers" in out) == (not last)
    assert results(tmp_path / "again") == whole
    assert len(asked()) == count and max(asked().values()) == 1


def begin_as_worker_0(monkeypatch) -> None:
    """Start worker 0 and stop it before its first answer."""

    def stopped(*_arguments, **_options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setattr(benchmark, "answers", stopped)
        assert pipeline("benchmark", *SETTINGS).status == 130


def refused(*settings: str) -> str:
    ran = pipeline("benchmark", *SETTINGS, *settings)
    assert ran.status in (1, 2), ran.out
    assert not list(Path("runs/benchmark").glob("*/manifest.json"))
    return " ".join(ran.out.split())


def test_two_workers_at_once_and_kills_give_the_same_bytes(folder, asked, finished, tmp_path, monkeypatch):
    run()
    whole, count = results(folder), len(asked())
    again, noted = current_copy(finished, tmp_path / "again", monkeypatch), tmp_path / "noted.jsonl"
    monkeypatch.setattr(benchmark, "answers", answering(noted, 0.02))
    rng = random.Random(0)
    for attempt in range(4):
        workers = two_workers(again, monkeypatch)
        if attempt < 3:
            seen = len(noted.read_text().splitlines()) if noted.exists() else 0
            while all(w.is_alive() for w in workers) and (
                not noted.exists() or len(noted.read_text().splitlines()) < seen + 5
            ):
                time.sleep(0.005)
            for worker in rng.sample(workers, 2):
                time.sleep(rng.uniform(0, 0.1))
                worker.kill()
        for worker in workers:
            worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert results(again) == whole
    done = Counter(noted.read_text().splitlines())
    assert len(done) == count and done.total() <= count + 6  # those under way


def test_another_number_of_workers_goes_on(folder, asked, finished, tmp_path, monkeypatch):
    run()
    whole, count = results(folder), len(asked())
    again = current_copy(finished, tmp_path / "again", monkeypatch)
    (tmp_path / "asked.jsonl").unlink()
    for rank, world in (("0", "3"), ("1", "3"), ("0", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        run()
    assert results(again) == whole
    assert len(asked()) == count and max(asked().values()) == 1


def test_a_further_strength_or_sample_costs_only_itself(folder, asked):
    run()
    first, before = len(asked()), of(folder)
    assert f"{first} of this worker's are there from before" in run("benchmark.strengths=[0,1,2,4]")
    (added,) = set(folder.glob("runs/benchmark/*")) - {before}
    places = [json.loads(line) for line in (added / "attempts.jsonl").read_text().splitlines()]
    assert [(each["condition"], each["problem"], each["sample"]) for each in places] == [
        (c, p, s) for c in range(7) for p in range(5) for s in range(2)
    ]  # under numbers of their own
    assert len(asked()) - first == 2 * 5 * 2  # the feature and its control
    second = len(asked())
    run("benchmark.samples=3")
    assert len(asked()) - second == 5 * 5
    third = len(asked())
    run("benchmark.seed=1")
    assert len(asked()) - third == ANSWERS
    assert max(asked().values()) == 1
    run("benchmark.top_p=0.9")
    assert asked().total() == third + 2 * ANSWERS
    assert len(list(folder.glob("runs/benchmark/*"))) == 5


def test_a_full_disk_loses_nothing_that_ended(folder, asked, finished, tmp_path, monkeypatch):
    run()
    whole = results(folder)
    again = current_copy(finished, tmp_path / "again", monkeypatch)
    (tmp_path / "asked.jsonl").unlink()
    write, written = Journal.add, []

    def full(self, value):
        if len(written) == 7:
            self._file.write(b'{"key": "abc", "condi')
            raise OSError(28, "No space left on device", str(self.path))
        write(self, value)
        written.append(value)

    monkeypatch.setattr(Journal, "add", full)
    said = refused()
    assert "attempts-0.jsonl: No space left on device" in said and "run the same command again to go on" in said
    monkeypatch.setattr(Journal, "add", write)
    assert "7 of this worker's are there from before" in run()
    assert results(again) == whole


def test_other_numerics_stop_unless_allowed_and_keep_what_was_answered(folder, asked):
    stop_after(2)
    path = of(folder) / "begun.json"
    begun = read_json(path)
    assert begun["numerics"]["threads"] == 1  # as the settings have it
    with pytest.MonkeyPatch.context() as patch:
        own = benchmark.numerics
        patch.setattr(benchmark, "numerics", lambda *a, **more: own(*a, **more) | {"device": "Another"})
        assert f"begun under other numerics (device: {begun['numerics']['device']} then, Another now)" in refused()
        ran = pipeline("benchmark", *SETTINGS, "--allow-mixed")
        assert ran.status == 0, ran.out
    assert len(asked()) == ANSWERS and asked().total() == ANSWERS + 1  # the third was under way
    assert len({line["key"] for line in lines(folder)}) == ANSWERS


def stop_after(count: int) -> None:
    """Stop with so many answers in the journal and one under way."""
    answers = benchmark.answers

    def stopped(*arguments, **options):
        for number, found in enumerate(answers(*arguments, **options)):
            if number == count:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "answers", stopped)
        assert pipeline("benchmark", *SETTINGS).status == 130


def test_the_engine_gives_the_same_bytes_by_one_two_and_killed_workers(folder, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "answers", engine.answers)
    monkeypatch.setattr(benchmark, "grade", grading.grade)
    out = run()
    whole = results(folder)
    changed = [line["changed"] > 0 for line in lines(folder)]
    assert changed == [line["condition"] > 0 for line in lines(folder)]
    assert len({line["text"] for line in lines(folder)}) > 10
    conditions = read_figures(of(folder)).own(HOOK).lists["benchmark"]["conditions"]
    assert all(each["name"] in out for each in conditions)
    again = current_copy(finished, tmp_path / "again", monkeypatch)
    for times in range(20):
        workers = two_workers(again, monkeypatch)
        time.sleep(0.5 + 0.1 * times)  # later and later, so that it ends whatever the machine
        killed = workers[times % 2]
        killed.kill()
        for worker in workers:
            worker.join()
        if list(again.glob("runs/benchmark/*/manifest.json")):
            break
    else:
        raise AssertionError("never ended")
    assert results(again) == whole
