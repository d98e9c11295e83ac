"""What is asked of the model, one after another in the one thread that has it, in turns.

A turn is a whole job, or what an iterator computes in a twentieth of a second, and one step at least: a question waits
for a token of each answer that is written, and for the questions before it, not for a whole answer. More answers than
`streams` wait for one of these to end, as each has keys and values of its own in memory. More than `waiting` of both
are refused with `Busy`, and answers from half of that on, so that nothing waits for ever and answers that wait leave
room for questions.

A client that hangs up ends what was done for it before anything else is computed, and `close` ends everything. A step
that is being computed is the one thing that nobody interrupts: the reading of a long text or prompt.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from harvest.files import UserError, is_out_of_memory

T = TypeVar("T")
TURN = 0.05  # seconds
LONGEST_RETRY = 60  # seconds
CLOSING = 0.5  # seconds that `close` waits for the step at hand


class Busy(Exception):  # noqa: N818  # the client's fault is none
    """Too much waits. `retry_after` says in how many seconds all of it has had a turn."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests at once; ask again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):  # noqa: N818
    """The desk was closed before this was done."""

    def __init__(self) -> None:
        super().__init__("the explorer is being closed")


class _Task:
    """Something that was asked: a job, which gives one thing, or an answer, which is long.

    `make` and the iterator run in the desk's thread; what they give goes to the asker's loop.
    """

    def __init__(self, make: Callable[[], Iterator[Any]], is_long: bool) -> None:
        self.make, self.is_long = make, is_long
        self.iterator: Iterator[Any] | None = None
        self.left = False  # whether nobody waits for it any more
        self.loop = asyncio.get_running_loop()
        self.given: asyncio.Queue[tuple[Any, Exception | None]] = asyncio.Queue()

    def give(self, value: Any, error: Exception | None = None) -> None:
        """Hand something to the asker; an error, or StopAsyncIteration, is the last."""
        try:
            self.loop.call_soon_threadsafe(self.given.put_nowait, (value, error))
        except RuntimeError:  # the loop is closed
            self.left = True

    def turn(self) -> bool:
        """Compute for a while; whether it ended."""
        stop = time.monotonic() + TURN
        try:
            self.iterator = self.iterator or self.make()
            while not self.left:
                self.give(next(self.iterator))
                if not self.is_long:
                    return True
                if time.monotonic() >= stop:
                    break
            return False
        except StopIteration:
            end: Exception = StopAsyncIteration()
        except Exception as error:  # whatever a job raises is its asker's
            end = error
        if is_out_of_memory(end):  # in place of the error, whose frames hold the tensors
            end = UserError("out of memory; a shorter text, fewer new tokens or fewer answers at once take less")
        self.give(None, end)
        del end  # it would hold its own frame, and with it all tensors there
        return True

    def end(self) -> None:
        """Close the iterator."""
        if close := getattr(self.iterator, "close", None):
            with suppress(Exception):  # nobody is left to be told
                close()


class Stream(AsyncIterator[T], Generic[T]):
    """What an iterator gives, as it comes. It ends when a wait for it is cancelled, and when it is forgotten."""

    def __init__(self, task: _Task, wake: Callable[[], None]) -> None:
        self._task, self._wake = task, wake

    async def __anext__(self) -> T:
        try:
            value, error = await self._task.given.get()
        except BaseException:
            self._leave()
            raise
        if error is None:
            return value
        self._task.give(None, StopAsyncIteration())  # for whoever asks once more
        try:
            raise error
        finally:
            del error  # as in `turn`

    async def aclose(self) -> None:
        """End the iterator before anything else is computed."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._task.left = True
        self._wake()


class Desk:
    """The thread and what waits for it; its methods are those of a running event loop."""

    def __init__(self, waiting: int = 64, streams: int = 4) -> None:
        self._waiting, self._streams = waiting, streams
        self._lock = threading.Lock()  # of the next two
        self._open: set[_Task] = set()
        self._closed = False
        self._pace = TURN  # seconds of a turn, on average
        # One that may be put to wherever the garbage collector deletes a stream. None only wakes the thread.
        self._inbox: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], T]) -> T:
        """The result of a job.

        Raises what it raises (UserError where memory runs out), Busy where too much waits, and Closed.
        """
        stream = self._ask(lambda: (job() for _ in range(1)), is_long=False)
        return await anext(stream)

    def stream(self, make: Callable[[], Iterator[T]]) -> Stream[T]:
        """What an iterator gives, as it comes; `make` and its steps run in the thread.

        Raises Busy and Closed at once; iterating raises what the iterator raises, as `run` does.
        """
        return self._ask(make, is_long=True)

    def close(self) -> None:
        """End everything that was asked, now: askers get Closed, and no step is begun any more."""
        with self._lock:
            self._closed = True
            for task in self._open:
                task.left = True
                task.give(None, Closed())
        self._inbox.put(None)
        self._thread.join(CLOSING)

    def _ask(self, make: Callable[[], Iterator[T]], is_long: bool) -> Stream[T]:
        task = _Task(make, is_long)
        with self._lock:
            if self._closed:
                raise Closed
            answers = sum(task.is_long for task in self._open)
            if len(self._open) >= self._waiting or (is_long and answers >= self._waiting // 2):
                raise Busy(min(LONGEST_RETRY, max(1, math.ceil(len(self._open) * self._pace))))
            self._open.add(task)
        self._inbox.put(task)
        return Stream(task, lambda: self._inbox.put(None))

    def _work(self) -> None:
        turns: deque[_Task] = deque()
        later: deque[_Task] = deque()  # answers that wait for another to end
        while True:
            while not turns or not self._inbox.empty():
                if task := self._inbox.get():
                    (later if task.is_long else turns).append(task)
                if self._closed:
                    break
                self._sort_out(turns, later)
            if self._closed:
                break
            self._sort_out(turns, later)
            if not turns:
                continue
            task, began = turns.popleft(), time.monotonic()
            if task.turn():
                self._forget(task)
            else:
                turns.append(task)
            self._pace += 0.1 * (time.monotonic() - began - self._pace)
        for task in (*turns, *later):
            self._forget(task)

    def _sort_out(self, turns: deque[_Task], later: deque[_Task]) -> None:
        """End what nobody waits for, and give turns to answers as long as there are few."""
        for group in (turns, later):
            for task in [task for task in group if task.left]:
                group.remove(task)
                self._forget(task)
        while later and sum(task.is_long for task in turns) < self._streams:
            turns.append(later.popleft())

    def _forget(self, task: _Task) -> None:
        task.end()
        with self._lock:
            self._open.discard(task)
