"""Progress for people: a bar on a terminal, plain lines elsewhere, and a small file that `status` reads."""

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from harvest.files import write_json

PLAIN_SECONDS = 15.0  # between lines when the output is no terminal
FILE_SECONDS = 2.0  # between writes of the file


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
            return f"{size / scale:.0f} {unit}" if size >= 100 * scale else f"{size / scale:.2g} {unit}"
    return f"{size / 1e3:.0f} kB"


class Progress:
    """Counts units of work and says how fast they go and how long the rest takes.

    `start` is what an earlier run had done already; it does not count for the speed. With a `path`,
    {done, total, unit, seconds_left} is kept there for `status`. `quiet` counts in silence; without
    `closing_line` the end of the work is not told.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        start: int = 0,
        path: Path | None = None,
        quiet: bool = False,
        closing_line: bool = True,
    ) -> None:
        self._closing_line = closing_line
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self.path, self.quiet = None if quiet else path, quiet
        self._start, self._began = start, time.monotonic()
        self._last_line = self._last_file = self._began
        self._bar: Bar | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
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
        elif kind is None and self._closing_line:
            self._line()

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more units; `note` is shown beside the figures."""
        self.done += amount
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done, text=f"{self._figures(now)}  {note}")
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._line(note)
        if self.path and now - self._last_file >= FILE_SECONDS:
            self._last_file = now
            left = round(self._seconds_left(now))
            write_json(self.path, {"done": self.done, "total": self.total, "unit": self.unit, "seconds_left": left})

    def say(self, text: str) -> None:
        """Show what is waited for, in place of the figures."""
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, text=text)
        elif not self.quiet and now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def _rate(self, now: float) -> float:
        return (self.done - self._start) / max(now - self._began, 1e-9)

    def _seconds_left(self, now: float) -> float:
        return (self.total - self.done) / max(self._rate(now), 1e-9)

    def _figures(self, now: float) -> str:
        text = f"{self.done:,}/{self.total:,} {self.unit}  {self._rate(now):,.0f} {self.unit}/s"
        return f"{text}  {duration(self._seconds_left(now))} left" if self.done < self.total else text

    def _line(self, note: str = "") -> None:
        if self.quiet:
            return
        print(f"{self.title}: {self._figures(time.monotonic())}  {note}".rstrip(), file=sys.stderr, flush=True)
