"""Processes that train together: what is said where the others do not come, hang or die, and signals meanwhile."""

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harvest.files import UserError
from train.parallel import FeatureRanks

SECONDS = 60  # longer than any of the tests


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"RANK=0, WORLD_SIZE=2: where the processes meet is not said"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, r"MASTER_PORT=70000\)"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, r"RANK=one, WORLD_SIZE=2: RANK counts from 0"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, r"RANK=0, WORLD_SIZE=two: RANK counts from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2, WORLD_SIZE=2: RANK counts from 0"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, r"LOCAL_RANK=-1: it counts the processes"),
    ],
)
def test_an_environment_that_cannot_be_is_one_sentence(monkeypatch, environment, message) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        FeatureRanks.from_environment(torch.device("cpu"))


def of_two(rank: int, port: int, seconds: float, end: str | None, folder: Path) -> None:
    """Rank 0 or 1 of two; what ends it goes into a file. With `end`, rank 1 comes to an end, or no further, at once."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the commands do
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    (folder / "started").touch()
    said = "nothing"
    try:
        ranks = FeatureRanks.from_environment(torch.device("cpu"), seconds)
        ranks.sum(torch.ones(3))
        if rank and end == "dies":
            os._exit(3)
        if rank:
            time.sleep(SECONDS)
        (folder / "met").touch()
        ranks.sum(torch.ones(3))
    except UserError as error:
        said = str(error)
    except KeyboardInterrupt:
        said = "interrupted"
    (folder / "said").write_text(said)
    os._exit(0)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Callable[[], str]]]]:
    """Starts rank 0 of two, and rank 1 where they meet; gives rank 0 and a function that waits for what it says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    started: list[Any] = []

    def start(seconds: float = SECONDS, end: str | None = None) -> tuple[Any, Callable[[], str]]:
        port = free_port()
        for rank in range(2 if end else 1):
            folder = tmp_path / str(rank)
            folder.mkdir()
            started.append(context.Process(target=of_two, args=(rank, port, seconds, end, folder)))
            started[-1].start()

        def said() -> str:
            started[0].join(30)
            return (tmp_path / "0" / "said").read_text()

        wait_for(tmp_path / "0" / ("met" if end else "started"))
        return started[0], said

    yield start
    for process in started:
        process.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nobody_comes(two) -> None:
    _, said = two(seconds=1)
    assert re.search(
        r"the other processes did not come to 127.0.0.1:\d+ within 1s \(train.runtime.peers_seconds\)", said()
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_waiting_for_others_at_the_start(two, number) -> None:
    process, said = two()
    time.sleep(0.5)
    os.kill(process.pid, number)
    assert said() == "interrupted"


def test_a_signal_ends_the_waiting_for_one_that_hangs(two) -> None:
    process, said = two(end="hangs")
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert said() == "interrupted"


def test_one_that_died_is_said(two) -> None:
    _, said = two(end="dies")
    assert re.search(r"train: another process of this training has ended .*; start all of them again", said())
