"""A window is made, trained on and deleted: the SAE of the whole store, never more than two windows, nothing lost."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import contents, current_copy, only, pipeline
from test_peers import free_port

from evaluate.figures import read_figures
from harvest.activation_store import ActivationStore
from harvest.disk import limit_in_shards, shard_bytes
from harvest.shard_buffer import ShardBuffer
from harvest.store_files import LocalFiles
from harvest.workers import Workers
from train import training

LIMIT = "harvest.runtime.disk_limit=2 windows"
# One row of sixteen is left out, so that the last steps of the epoch read the first window again.
SHORT = ("train.exclude.positions=[0]", "train.epochs=1", "harvest.hooks=[model.layers.0,model.layers.1]")
SWEEP = "train.sweep.l1_coefficient=[1,3]"
FORK = multiprocessing.get_context("fork")  # a process that has imported everything


def weights(folder: Path) -> dict[str, bytes]:
    return contents(folder / "runs/train", "*/*/*.safetensors")


def shards_on_disk(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("runs/harvest/*/store/train/row/token_id/c/*")}


@pytest.fixture(scope="module")
def sampled(finished, tmp_path_factory) -> Path:
    """Tiny assets and the contexts of the finished run; read only."""
    folder = tmp_path_factory.mktemp("sampled")
    for name in ("assets", "runs/sample"):
        shutil.copytree(finished / name, folder / name)
    shutil.copy(finished / "runs/.inputs.json", folder / "runs/.inputs.json")
    return folder


@pytest.fixture
def folder(sampled, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder."""
    return current_copy(sampled, tmp_path / "copy", monkeypatch)


def streamed(*overrides: str) -> str:
    ran = pipeline("stream", *overrides)
    assert ran.status == 0, ran.out
    return ran.out


def test_four_epochs_on_two_windows(finished, folder, monkeypatch):
    seen, write = [], ActivationStore.write_shard

    def watched(self, split, shard, rows):
        write(self, split, shard, rows)
        if split == "train":
            seen.append(shards_on_disk(folder))

    monkeypatch.setattr(ActivationStore, "write_shard", watched)
    said = streamed(LIMIT)
    assert weights(folder) == weights(finished)
    assert len(seen) == 4 * 6 and max(map(len, seen)) == 4
    assert seen[:6] == [{"0"}, {"0", "1"}, {"0", "1", "2"}, {"0", "1", "2", "3"}, {"2", "3", "4"}, {"2", "3", "4", "5"}]
    assert shards_on_disk(folder) == set()
    assert said.index("harvest   complete") < said.index("train     complete")
    manifest = json.loads(only(folder, "runs/harvest/*/manifest.json").read_text())
    assert manifest["summary"]["train_rows"] == 1536
    assert manifest["summary"]["streamed_to"] == only(folder, "runs/train/*").name
    store = only(folder, "runs/harvest/*/store")
    held_out = {name: data for name, data in contents(store).items() if not name.startswith("train")}
    whole = contents(only(finished, "runs/harvest/*/store"))
    assert held_out == {name: data for name, data in whole.items() if not name.startswith("train")}


def test_hooks_and_a_sweep_with_rows_left_out(folder):
    for stage in ("harvest", "train"):
        assert pipeline(stage, *SHORT, SWEEP).status == 0
    expected = weights(folder)
    assert len(expected) == 4
    for stage in ("sample", "harvest", "train"):
        shutil.rmtree(folder / "runs" / stage)
    streamed(*SHORT, SWEEP)
    assert weights(folder) == expected


def test_a_whole_store_is_read_as_it_is(finished, run_folder):
    shutil.rmtree(run_folder / "runs/train")
    streamed(LIMIT)
    assert weights(run_folder) == weights(finished)
    assert len(shards_on_disk(run_folder)) == 6


def test_what_is_left_of_a_stream(folder):
    """Its held-out shards, and records of the others. Further training makes the rows again."""
    one_epoch = ("train.epochs=1",)
    streamed(*one_epoch)
    ran = pipeline("verify", *one_epoch)
    assert ran.status == 0 and "6 training shards are not there: a stream (`make stream`) has deleted" in ran.out
    assert "harvest   complete" in pipeline("harvest").out
    ran = pipeline("train", "train.lr=2e-3", *one_epoch)
    assert ran.status == 1 and "`make stream` makes them again as it trains" in ran.out
    contexts = ("evaluate.reason_score.contexts=40", "evaluate.steering=null", "evaluate.features.count=1")
    assert pipeline("evaluate", *one_epoch, *contexts).status == 0
    (sae,) = read_figures(only(folder, "runs/evaluate/*")).saes
    assert sae.lists["reason_score"]["rows_from"] == "model" and sae.value("contexts_of_training") > 0
    streamed("train.lr=2e-3", *one_epoch)
    again = weights(folder)
    assert len(again) == 2
    assert shards_on_disk(folder) == set()
    assert pipeline("harvest", "--force", "--yes").status == 0
    assert len(shards_on_disk(folder)) == 6
    shutil.rmtree(folder / "runs/train")
    for settings in (one_epoch, ("train.lr=2e-3", *one_epoch)):
        assert pipeline("train", *settings).status == 0
    assert weights(folder) == again


def run_killed(change: Callable[[], None]) -> int:
    """Status of `stream` in a process of its own, of which a patch has been made."""

    def run() -> None:
        change()
        os._exit(pipeline("stream", LIMIT).status)

    process = FORK.Process(target=run)
    process.start()
    process.join(120)
    return process.exitcode or 0


def killed_at(owner: object, name: str, call: int) -> Callable[[], None]:
    """A patch that ends the process by SIGKILL at a call of a function."""

    def change() -> None:
        original, calls = getattr(owner, name), []

        def counted(*arguments: object) -> object:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(owner, name, counted)

    return change


@pytest.mark.parametrize("another_worker_runs", [False, True])
def test_rows_that_a_kill_left_without_a_record(folder, monkeypatch, another_worker_runs):
    """They would be on the disk beside two windows. One that another worker writes has no record yet either."""
    assert run_killed(killed_at(LocalFiles, "write", 40)) == -signal.SIGKILL
    directory = only(folder, "runs/harvest/*")
    store = ActivationStore.open(directory / "store")
    recorded = {str(shard) for shard in store.recorded_shards("train")}
    left = shards_on_disk(folder) - recorded
    assert len(left) == 1
    monkeypatch.setattr("train.run.HookTraining", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with Workers(int(another_worker_runs), 2).locked(directory, "harvest") if another_worker_runs else nullcontext():
        assert pipeline("stream", LIMIT).status == 130
    assert shards_on_disk(folder) - recorded == (left if another_worker_runs else set())
    assert shards_on_disk(folder) & recorded == recorded


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (LocalFiles, "write", 40),  # within the first window's shards
        (LocalFiles, "write", 75),  # in the second epoch
        (LocalFiles, "delete", 2),  # a record says consumed, its files are there
        (training, "save_checkpoint", 1),
        (training, "save_checkpoint", 2),
    ],
)
def test_kill_9_at_any_moment(finished, folder, owner, name, call):
    assert run_killed(killed_at(owner, name, call)) == -signal.SIGKILL
    streamed(LIMIT)
    assert weights(folder) == weights(finished)
    assert shards_on_disk(folder) == set()


@pytest.mark.parametrize("shard", [5, 9])
def test_ctrl_c_while_a_window_is_made(finished, folder, monkeypatch, shard):
    """The shard in hand is finished, checkpoints are saved."""
    started, start = [], ShardBuffer.start

    def interrupted(self, *arguments):
        started.append(1)
        if len(started) == shard:
            os.kill(os.getpid(), signal.SIGINT)
        return start(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardBuffer, "start", interrupted)
        ran = pipeline("stream")
    assert ran.status == 130, ran.out
    assert "nothing complete is lost" in ran.out
    assert len(list(folder.glob("runs/train/*/*/checkpoints/*/checkpoint.json"))) >= 1
    streamed()
    assert weights(folder) == weights(finished)


def test_a_stream_that_was_stopped_becomes_a_whole_store(finished, folder):
    assert run_killed(killed_at(training, "save_checkpoint", 2)) == -signal.SIGKILL
    assert "run `make harvest`" in pipeline("train").out
    assert pipeline("harvest").status == 0
    assert contents(only(folder, "runs/harvest/*/store")) == contents(only(finished, "runs/harvest/*/store"))
    assert pipeline("train").status == 0
    assert weights(folder) == weights(finished)


def test_two_ranks_share_windows_and_features(folder):
    """As from the whole store: a window's shards are shared out, and each rank trains its features on all of them.

    On the CPU: a machine may have one GPU for the two.
    """
    on_cpu = ("harvest.runtime.device=cpu", "train.runtime.device=cpu")
    often = ("train.runtime.checkpoint_every=null", "train.runtime.checkpoint_minutes=1e-6")

    def run(rank: int, port: int, stage: str) -> None:
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in place.items()})
        if rank:  # its clock stands still: it writes when the other one is due
            training.time = SimpleNamespace(monotonic=lambda: 0.0)
        ran = pipeline(stage, "train.epochs=1", *on_cpu, *often)
        print(ran.out)
        os._exit(ran.status)

    def run_both(stage: str) -> None:
        port = free_port()
        ranks = [FORK.Process(target=run, args=(rank, port, stage)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        ended = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()  # one that waits for the other
        assert ended == [0, 0]

    run_both("stream")
    expected = weights(folder)
    assert shards_on_disk(folder) == set()
    shutil.rmtree(folder / "runs/train")
    assert pipeline("harvest", "--force", "--yes", *on_cpu).status == 0
    run_both("train")
    assert weights(folder) == expected
    assert len(list(folder.glob("runs/train/*/*/checkpoints/*/checkpoint.json"))) > 1


def test_settings_that_a_stream_cannot_serve(folder):
    def refused(*overrides: str) -> str:
        ran = pipeline("stream", *overrides)
        assert ran.status == 1 and not list(folder.glob("runs/harvest/*/stream.json")), ran.out
        return ran.out

    assert "s3://bucket/a: a stream keeps its rows on a local disk" in refused("harvest.runtime.store=s3://bucket/a")
    said = refused("harvest.runtime.disk_limit=3 shards")
    assert "room for 3 shards; a stream needs two windows of train.window_shards=2, 4 shards = " in said
    ran = pipeline("stream", "harvest.runtime.disk_limit=many")
    assert ran.status == 2 and "harvest.runtime.disk_limit: 'many'" in ran.out


def test_a_full_disk_is_known_before_the_first_shard(finished, folder, monkeypatch):
    """Two held-out shards, and two windows of two."""
    needed = 6 * shard_bytes(ActivationStore.open(only(finished, "runs/harvest/*/store")).geometry)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**15, 0, needed - 1))
    ran = pipeline("stream")
    assert ran.status == 1 and "6 shards are still to be written" in ran.out
    assert not list(folder.glob("runs/harvest/*/store/*/shards"))


@pytest.mark.parametrize(
    ("limit", "shards"),
    [
        ("3 windows", 12),
        ("3windows", 12),
        ("7 shards", 7),
        ("1 shard", 1),
        ("2.5 windows", 10),
        ("10MB", 9),
        ("3MiB", 3),
    ],
)
def test_limits(limit, shards):
    assert limit_in_shards(limit, 10**6, 4, 30) == shards
