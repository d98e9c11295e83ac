"""What a person reads while a stage works."""

import json
from pathlib import Path

import pytest

from harvest import progress as module
from harvest.progress import Progress


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
