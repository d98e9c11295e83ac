"""Several workers of one harvest: the same bytes, and what happens when one is late, twice there, or dead."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest
import torch
from conftest import contents, only, pipeline, start

from harvest.activation_store import ActivationStore
from harvest.files import is_abandoned, is_locked, read_json, write_sealed
from harvest.shard_buffer import ShardBuffer
from harvest.workers import Shard, Workers

NO_WAIT = "harvest.runtime.wait_seconds=0"
EVERY = [Shard("holdout", 0), Shard("holdout", 1), *(Shard("train", number) for number in range(6))]


@pytest.fixture
def sampled(fresh_folder):
    assert pipeline("sample").status == 0
    return fresh_folder


@pytest.fixture
def as_worker(monkeypatch):
    """Become a worker of several; with nothing, one on its own."""

    def become(rank: int | None = None, world: int = 1) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
            if rank is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return become


def stored(folder) -> dict[str, bytes]:
    return contents(only(folder, "runs/harvest/*/store"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
def test_the_last_worker_ends_the_harvest(finished, sampled, as_worker, order):
    """Workers one after another, in any order, give the bytes of one; nobody waits for others."""
    begin_as_worker_0(as_worker, len(order))
    for number, rank in enumerate(order):
        as_worker(rank, len(order))
        ran = pipeline("harvest")
        assert ran.status == 0, ran.out
        ended = number == len(order) - 1
        assert ("harvest   complete" in ran.out) == ended
        assert len(list(sampled.glob("runs/harvest/*/manifest.json"))) == ended
        if number == 0:
            missing = 8 - len(EVERY[rank :: len(order)])
            assert f"{missing} of 8 are missing (holdout " in ran.out
            assert "start the harvest again, with any number of workers" in ran.out
    assert stored(sampled) == stored(finished)


def begin_as_worker_0(as_worker, world: int) -> None:
    """Start worker 0 and stop it before its first shard."""

    def stopped(*_arguments) -> None:
        raise KeyboardInterrupt

    as_worker(0, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardBuffer, "start", stopped)
        assert pipeline("harvest").status == 130


def test_another_number_of_workers_finishes_what_some_began(finished, sampled, as_worker):
    as_worker(0, 3)
    assert pipeline("harvest").status == 0
    as_worker(1, 2)
    assert pipeline("harvest").status == 0
    store = ActivationStore.open(only(sampled, "runs/harvest/*/store"))
    assert (store.complete_shards("holdout"), store.complete_shards("train")) == ({0, 1}, {1, 3, 4, 5})
    as_worker(0, 2)
    assert pipeline("harvest").status == 0
    assert stored(sampled) == stored(finished)


def test_two_processes_given_the_same_shards(finished, sampled, as_worker):
    """Worker 1 of 2, a process of its own, beside one that makes everything."""
    as_worker(1, 2)
    other = start("harvest", cwd=sampled)
    as_worker()
    directory = sampled / pipeline("path", "harvest").out.strip()
    while not is_locked(directory, "harvest-worker-1") and other.is_alive():
        time.sleep(0.02)
    ran = pipeline("harvest")
    other.join(120)
    assert (ran.status, other.exitcode) == (0, 0), ran.out
    assert stored(sampled) == stored(finished)


def test_a_worker_without_worker_0(sampled, as_worker):
    as_worker(1, 2)
    ran = pipeline("harvest", NO_WAIT)
    assert ran.status == 1
    assert "worker 0 has not begun it for 0s (harvest.runtime.wait_seconds)" in ran.out


def test_ranks_that_cannot_be(sampled, as_worker):
    as_worker(2, 2)
    ran = pipeline("harvest")
    assert ran.status == 1
    assert "RANK=2, WORLD_SIZE=2: RANK counts from 0" in ran.out
    as_worker(1, 2)
    assert pipeline("sample").status == 0  # complete
    assert "sample: works in one process" in pipeline("sample", "sample.seed=1").out
    assert "harvest --force: one of several workers" in pipeline("harvest", "--force").out


def test_a_worker_of_other_numerics_stops_unless_allowed(finished, sampled, as_worker):
    as_worker(0, 2)
    assert pipeline("harvest").status == 0
    path = only(sampled, "runs/harvest/*/begun.json")
    begun = read_json(path)
    write_sealed(path, begun | {"numerics": begun["numerics"] | {"device": "Another GPU"}})
    store = only(sampled, "runs/harvest/*/store/zarr.json")
    store.write_text(store.read_text().replace(begun["numerics"]["device"], "Another GPU"))
    as_worker(1, 2)
    ran = pipeline("harvest")
    assert ran.status == 1
    assert "begun under other numerics (device: Another GPU then, " in ran.out
    assert pipeline("harvest", "--allow-mixed").status == 0
    assert pipeline("harvest").status == 0  # known from now on
    as_worker()
    assert pipeline("harvest").status == 0
    manifest = json.loads(only(sampled, "runs/harvest/*/manifest.json").read_text())
    assert manifest["mixed_with"] == [begun["numerics"]]


def test_a_worker_runs_once_and_keeps_verify_out(sampled, as_worker):
    directory = sampled / pipeline("path", "harvest").out.strip()
    with Workers(1, 2).locked(directory, "harvest"):
        assert "harvest   running" in pipeline("status").out
        assert "another process is running this harvest" in pipeline("verify").out
        as_worker(1, 2)
        assert "another process is running this harvest-worker-1" in pipeline("harvest").out
        as_worker()
        assert "another process is running this harvest;" in pipeline("harvest", "--force", "--yes").out
    assert "harvest   would run" in pipeline("status").out


def test_only_dead_writers_files_are_swept(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()

    def abandoned(name: str, alone: bool) -> bool:
        return is_abandoned(tmp_path / name, alone)

    assert abandoned(f".00001.json.{host}.{ended.pid}.partial", alone=False)
    assert not abandoned(f".00001.json.{host}.{os.getppid()}.partial", alone=True)
    assert not abandoned(f".0.another.host.{ended.pid}.partial", alone=False)
    assert abandoned(f".0.another.host.{ended.pid}.partial", alone=True)
    assert abandoned(f"0.{'0' * 32}.partial", alone=True) and not abandoned(f"0.{'0' * 32}.partial", alone=False)


def test_what_a_killed_worker_left_is_gone_in_the_end(finished, sampled, as_worker):
    as_worker(0, 2)
    assert pipeline("harvest").status == 0
    ended = subprocess.Popen(["true"])
    ended.wait()
    acts = only(sampled, "runs/harvest/*/store/train/model.layers.1/acts/c")
    (acts / "1").mkdir()
    (acts / "1" / f".0.{socket.gethostname()}.{ended.pid}.partial").write_bytes(b"half")
    as_worker()
    assert pipeline("harvest").status == 0
    assert stored(sampled) == stored(finished)


def test_a_full_disk_stops_the_run_at_once(finished, sampled, monkeypatch):
    """The error of the writing thread ends the forward passes; a plain start goes on."""
    original = ActivationStore.write_shard
    written, batches = [], []

    def full(self, split, shard, rows):
        if len(written) == 2:
            raise OSError(28, "No space left on device", f"{self.path}/{split}/{shard}")
        original(self, split, shard, rows)
        written.append(shard)

    original_put = ShardBuffer.put

    def slow_put(self, *arguments):
        batches.append(1)
        time.sleep(0.2 if len(written) == 2 else 0)
        original_put(self, *arguments)

    monkeypatch.setattr(ActivationStore, "write_shard", full)
    monkeypatch.setattr(ShardBuffer, "put", slow_put)
    ran = pipeline("harvest")
    assert ran.status == 1
    assert "store/train/0: No space left on device" in ran.out
    assert len(batches) < 4 * 4, "the shard after the failed one was made to its end"
    monkeypatch.undo()
    monkeypatch.chdir(sampled)
    assert pipeline("harvest").status == 0
    assert stored(sampled) == stored(finished)


def test_the_forward_pass_waits_for_a_slow_writer(sampled, monkeypatch):
    """Two shards in memory and never a third."""
    events: list[tuple[str, Shard]] = []
    write, start = ActivationStore.write_shard, ShardBuffer.start
    third = threading.Event()

    def slow_write(self, split, shard, rows):
        if len(events) < 3:
            third.wait(0.5)  # for a third that must not come
        write(self, split, shard, rows)
        events.append(("written", Shard(split, shard)))

    def counted_start(self, shard, *arguments):
        events.append(("started", shard))
        if shard == EVERY[2]:
            third.set()
        return start(self, shard, *arguments)

    monkeypatch.setattr(ActivationStore, "write_shard", slow_write)
    monkeypatch.setattr(ShardBuffer, "start", counted_start)
    assert pipeline("harvest").status == 0
    assert [shard for event, shard in events if event == "written"] == EVERY
    for before, shard in zip(EVERY, EVERY[2:], strict=False):
        assert events.index(("written", before)) < events.index(("started", shard))


def test_a_clock_set_back_changes_nothing(finished, sampled, as_worker, monkeypatch):
    as_worker(0, 2)
    assert pipeline("harvest").status == 0
    for i, path in enumerate(sorted(sampled.glob("runs/**/*"))):
        os.utime(path, (2**32 - i, 2**32 - i))
    monkeypatch.setattr(time, "time", lambda: 1.0)
    as_worker()
    ran = pipeline("harvest")
    assert ran.status == 0, ran.out
    assert stored(sampled) == stored(finished)


def test_threads_are_ours_whatever_a_launcher_exports(sampled):
    torch.set_num_threads(2)
    assert pipeline("harvest", "harvest.runtime.device=cpu").status == 0
    assert torch.get_num_threads() == 1
