"""What a person reads while a stage works."""

import json
from pathlib import Path

import pytest

from harvest import progress as module
from harvest.progress import Progress, duration, size_text
from pipeline.tables import figures, hours, table


class Clock:
    """Stands in for `time`: seconds pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the module reads."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_time_left_is_that_of_the_last_minute(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "progress.json"
    with Progress("train", 2000, "tokens", path=path) as progress:
        for tokens in (1, 10):  # slow steps, then quick ones
            for _ in range(100):
                clock.now += 1
                progress.advance(tokens)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 15/2,000 tokens  1 tokens/s  33m05s left"
    assert lines[-2].endswith("10 tokens/s  1m35s left")  # at 195 s, of which 95 were quick
    assert json.loads(path.read_text())["seconds_left"] == 90


def test_marks_far_apart_are_all_kept(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("harvest", 100, "shards") as progress:
        for _ in range(10):
            clock.now += 120
            progress.advance(2)
    assert "20/100 shards  0.017 shards/s  1h20m left" in capsys.readouterr().err


def test_the_closing_line_has_the_mean_and_the_last_note(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 110, "tokens", start=10) as progress:
        for tokens in (20, 80):
            clock.now += 10
            progress.advance(tokens, "L0 30.1" if tokens == 20 else "")
    assert capsys.readouterr().err.splitlines()[-1] == "train: 110/110 tokens  5 tokens/s  L0 30.1"


def test_what_is_waited_for_is_said_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("benchmark", 10, "problems") as progress:
        for second in range(40):
            clock.now = second
            progress.say(f"the server is loading, {second}s")
        said = capsys.readouterr().err.splitlines()
    assert said == [f"benchmark: the server is loading, {second}s" for second in (15, 30)]
    with Progress("benchmark", 10, "problems", quiet=True) as progress:
        clock.now = 100
        progress.say("the server is loading")
    assert "loading" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-3, "0s"), (59.4, "59s"), (59.5, "1m00s"), (200, "3m20s"), (3599.4, "59m59s"), (3599.5, "1h00m")),
        *(
            (7530, "2h05m"),
            (10 * 86400, "240h00m"),
            (10 * 86400 + 60, "10 days"),
            (1.3e8, "1,505 days"),
            (None, "unknown"),
        ),
    ],
)
def test_times_for_people(seconds: float | None, text: str) -> None:
    assert hours(seconds) == text
    if seconds is not None and seconds < 86400:
        assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 kB"), (999_400, "999 kB"), (1e6, "1 MB"), (9.96e6, "10 MB"), (99.4e6, "99 MB"), (99.6e6, "100 MB")),
        *((537e6, "537 MB"), (8.59e9, "8.6 GB"), (8.21e12, "8.2 TB"), (1.5e15, "1500 TB")),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert size_text(size) == text


def test_the_figures_of_a_stage() -> None:
    """Lists, reasons and rows of a kind that there were none of are left out."""
    summary = {
        "train_rows": 1_234_567,
        "l0": 30.12345,
        "is_whole": True,
        "shards": [1, 2],
        "chat": {"rows": 12, "rows_cut": 0, "other": 0, "dropped": {"a": 1}, "share": 0.25},
        "note": "none",
    }
    assert figures(summary) == [
        "  train_rows   1,234,567",
        "  l0           30.12",
        "  is_whole     True",
        "  chat  rows   12",
        "  chat  other  0",
        "  chat  share  0.25",
        "  note         none",
    ]
    assert table([("a", "1"), ("bc", "234")], right=(1,)) == ["a     1", "bc  234"]
    assert table([("\x1b[31m", "1")]) == ["\\x1b[31m  1"]
