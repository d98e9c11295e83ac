"""The explorer's desk: one thread, fair turns, a bound, and an end at once. Events set the order, never a clock."""

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest

from harvest.files import UserError
from pipeline.explore import jobs
from pipeline.explore.jobs import Busy, Closed, Desk

SOON = 20  # seconds after which a test that hangs fails


@pytest.fixture(autouse=True)
def a_step_is_a_turn(monkeypatch):
    monkeypatch.setattr(jobs, "TURN", 0.0)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(waiting=6, streams=2)
    yield made
    made.close()


class Work:
    """Iterators and jobs that note what is done, and stop where they are told."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.go = threading.Event()
        self.at_the_gate = threading.Event()

    def gate(self) -> str:
        """A job that keeps the thread until `go`, so that a test can queue what it likes behind it."""
        self.at_the_gate.set()
        assert self.go.wait(SOON)
        return "gate"

    def note(self, name: str) -> str:
        self.done.append(name)
        return name

    def steps(self, name: str, count: int) -> Iterator[str]:
        try:
            for n in range(count):
                yield self.note(f"{name}{n}")
        finally:
            self.note(f"{name} closed")


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.go.set()


def within(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, SOON))


async def behind_the_gate(desk: Desk, work: Work) -> asyncio.Task:
    task = asyncio.create_task(desk.run(work.gate))
    await asyncio.to_thread(work.at_the_gate.wait, SOON)
    return task


async def all_of(stream) -> list[str]:
    return [item async for item in stream]


async def settled() -> None:
    """Let tasks that were made begin."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_results_and_errors_reach_their_askers(desk, work):
    def fails() -> None:
        raise KeyError("of the job")

    def fails_later() -> Iterator[int]:
        yield 1
        raise ValueError("of the step")

    def stops() -> None:
        raise StopIteration

    async def ask() -> None:
        assert await desk.run(lambda: threading.current_thread().name) == "model"
        assert await asyncio.gather(*(desk.run(lambda n=n: n) for n in range(3))) == [0, 1, 2]
        assert await all_of(desk.stream(lambda: work.steps("a", 3))) == ["a0", "a1", "a2"]
        with pytest.raises(KeyError, match="of the job"):
            await desk.run(fails)
        with pytest.raises(RuntimeError):
            await desk.run(stops)
        stream = desk.stream(fails_later)
        assert await anext(stream) == 1
        with pytest.raises(ValueError, match="of the step"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert await desk.run(lambda: "still there") == "still there"

    within(ask())


def test_a_question_waits_for_a_step_of_each_answer_and_no_longer(desk, work):
    async def ask() -> None:
        gate = await behind_the_gate(desk, work)
        answers = [asyncio.create_task(all_of(desk.stream(lambda n=n: work.steps(n, 3)))) for n in "ab"]
        await settled()
        question = asyncio.create_task(desk.run(lambda: work.note("question")))
        await settled()
        work.go.set()
        await asyncio.gather(gate, question, *answers)

    within(ask())
    assert work.done == ["a0", "b0", "question", "a1", "b1", "a2", "b2", "a closed", "b closed"]


def test_more_answers_than_there_is_room_for_wait_and_questions_pass_them(desk, work):
    async def ask() -> None:
        gate = await behind_the_gate(desk, work)
        answers = [asyncio.create_task(all_of(desk.stream(lambda n=n: work.steps(n, 2)))) for n in "abc"]
        await settled()
        with pytest.raises(Busy) as busy:  # three are half of all that may wait
            desk.stream(lambda: work.steps("refused", 1))
        assert 1 <= busy.value.retry_after <= jobs.LONGEST_RETRY
        questions = [asyncio.create_task(desk.run(lambda n=n: work.note(n))) for n in "xy"]
        await settled()
        with pytest.raises(Busy):
            await desk.run(lambda: work.note("refused"))
        work.go.set()
        await asyncio.gather(gate, *answers, *questions)
        assert await desk.run(lambda: work.note("room again")) == "room again"

    within(ask())
    assert work.done == ["a0", "b0", "x", "y", "a1", "b1", "a closed", "b closed", "c0", "c1", "c closed", "room again"]


@pytest.mark.parametrize("way", ["aclose", "cancel", "forget", "break"])
def test_who_goes_away_ends_the_answer_before_anything_else_is_computed(desk, work, way):
    async def ask() -> None:
        stream = desk.stream(lambda: work.steps("a", 1_000_000_000))
        assert await anext(stream) == "a0"
        gate = await behind_the_gate(desk, work)
        seen = len(work.done)
        question = asyncio.create_task(desk.run(lambda: work.note("question")))
        await settled()
        if way == "aclose":
            await stream.aclose()
        elif way == "cancel":
            reading = asyncio.create_task(all_of(stream))
            await settled()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        elif way == "break":
            async for _ in stream:
                break
        if way in ("forget", "break"):
            del stream
            gc.collect()
        work.go.set()
        await asyncio.gather(gate, question)
        assert work.done[seen:] == ["a closed", "question"]
        await asyncio.gather(*(desk.run(lambda: None) for _ in range(5)))  # its place is free

    within(ask())


def test_nor_is_the_rest_of_its_turn_computed(desk, work, monkeypatch):
    monkeypatch.setattr(jobs, "TURN", 1000.0)

    def held() -> Iterator[str]:
        yield work.note("a0")
        work.gate()
        yield work.note("a1")
        yield work.note("a2")

    async def ask() -> None:
        stream = desk.stream(held)
        assert await anext(stream) == "a0"
        await asyncio.to_thread(work.at_the_gate.wait, SOON)
        await stream.aclose()
        work.go.set()
        await desk.run(lambda: work.note("question"))

    within(ask())
    assert work.done == ["a0", "a1", "question"]


def test_a_question_that_nobody_waits_for_is_not_computed(desk, work):
    async def ask() -> None:
        gate = await behind_the_gate(desk, work)
        left, kept = (asyncio.create_task(desk.run(lambda n=n: work.note(n))) for n in ("left", "kept"))
        await settled()
        left.cancel()
        await settled()
        work.go.set()
        await asyncio.gather(gate, kept)

    within(ask())
    assert work.done == ["kept"]


def test_close_ends_everything_though_a_step_is_at_work(desk, work, monkeypatch):
    monkeypatch.setattr(jobs, "CLOSING", 0.01)

    def held() -> Iterator[str]:
        for name in work.steps("a", 1_000_000_000):
            yield name
            work.gate()

    async def ask() -> None:
        stream = desk.stream(held)
        assert await anext(stream) == "a0"
        await asyncio.to_thread(work.at_the_gate.wait, SOON)
        question = asyncio.create_task(desk.run(lambda: work.note("question")))
        await settled()
        desk.close()
        with pytest.raises(Closed):
            await anext(stream)
        with pytest.raises(Closed):
            await question
        with pytest.raises(Closed):
            desk.stream(held)
        with pytest.raises(Closed):
            await desk.run(lambda: work.note("after"))
        work.go.set()
        await asyncio.to_thread(desk._thread.join, SOON)

    within(ask())
    assert not desk._thread.is_alive() and work.done == ["a0", "a1", "a closed"]
    desk.close()


def test_a_loop_that_has_gone_leaves_the_desk_to_others(desk, work):
    async def leave() -> jobs.Stream[str]:
        stream = desk.stream(lambda: work.steps("a", 1_000_000_000))
        assert await anext(stream) == "a0"
        return stream

    kept = within(leave())
    assert within(desk.run(lambda: "another loop")) == "another loop"
    assert work.done[-1] == "a closed" and kept is not None


def test_out_of_memory_is_an_error_of_the_one_job(desk):
    def takes_all() -> None:
        raise MemoryError

    async def ask() -> None:
        with pytest.raises(UserError, match="out of memory; a shorter text") as told:
            await desk.run(takes_all)
        assert told.value.__context__ is None  # its frames would hold the tensors
        assert await desk.run(lambda: 1) == 1

    within(ask())
