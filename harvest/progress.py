"""Progress for people: a bar on a terminal, plain lines elsewhere, and a small file that `status` reads."""

import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from harvest.files import write_json

PLAIN_SECONDS = 15.0  # between lines when the output is no terminal
FILE_SECONDS = 2.0  # between writes of the file
MARK_SECONDS = 1.0  # between the marks that the speed is taken from, at least
MARKS = 60


def duration(seconds: float) -> str:
    """Short form of a time: 7s, 3m20s, 2h05m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def size_text(size: float) -> str:
    """Bytes for people, in powers of ten: 8.2 TB, 537 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.0f} {unit}" if size >= 99.5 * scale else f"{size / scale:.2g} {unit}"
    return f"{size / 1e3:.0f} kB"


class _Mark(NamedTuple):
    time: float  # of time.monotonic
    done: int


class Progress:
    """Counts units of work and says how fast they go and how long the rest takes.

    The speed is that of the last marks, about a minute: the first steps of a stage are slower than those that follow.
    The closing line has the mean. `start` is what an earlier run had done already; it does not count for the speed.
    With a `path`, {done, total, unit, seconds_left} is kept there for `status`. `quiet` counts in silence.
    """

    def __init__(
        self, title: str, total: int, unit: str, start: int = 0, path: Path | None = None, quiet: bool = False
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self.path, self.quiet = None if quiet else path, quiet
        self._first = _Mark(time.monotonic(), start)
        self._marks = deque([self._first], maxlen=MARKS)
        self._note = ""
        self._last_line = self._last_file = self._first.time
        self._bar: Bar | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), expand=True)
            self._task = self._bar.add_task(title, total=total, completed=start, text="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more units; `note` is shown beside the figures, until the next one."""
        self.done += amount
        self._note = note or self._note
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done, text=f"{self._figures(now)}  {self._note}")
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._line()
        if self.path and now - self._last_file >= FILE_SECONDS:
            self._last_file = now
            left = round(self._seconds_left(now))
            write_json(self.path, {"done": self.done, "total": self.total, "unit": self.unit, "seconds_left": left})
        if now - self._marks[-1].time >= MARK_SECONDS:
            self._marks.append(_Mark(now, self.done))

    def say(self, text: str) -> None:
        """Show what is waited for, in place of the figures."""
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, text=text)
        elif not self.quiet and now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def _rate(self, now: float) -> float:
        since = self._marks[0] if self.done < self.total else self._first
        return (self.done - since.done) / max(now - since.time, 1e-9)

    def _seconds_left(self, now: float) -> float:
        return (self.total - self.done) / max(self._rate(now), 1e-9)

    def _figures(self, now: float) -> str:
        rate = self._rate(now)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        text = f"{self.done:,}/{self.total:,} {self.unit}  {speed} {self.unit}/s"
        return f"{text}  {duration(self._seconds_left(now))} left" if self.done < self.total else text

    def _line(self) -> None:
        if self.quiet:
            return
        text = f"{self.title}: {self._figures(time.monotonic())}  {self._note}"
        print(text.rstrip(), file=sys.stderr, flush=True)
