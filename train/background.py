"""Writes that go on while the device trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """One write at a time, in order; the next waits for it, and what it raises comes out at the next call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start a write when the one before it is done: no more than one is held in memory."""
        self.wait()
        self._pending = self._executor.submit(write)

    def wait(self, only_if_done: bool = False) -> None:
        """Wait for the write under way, or just raise what a finished one raised."""
        if self._pending and (self._pending.done() or not only_if_done):
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for the write under way, and take no more."""
        with self._executor:
            self.wait()
