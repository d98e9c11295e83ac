"""Harvest and training side by side on a bounded disk: the same SAE, never more shards than allowed, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, contents, only, pipeline

from harvest import stream as streams
from harvest.activation_store import ActivationStore
from harvest.disk import limit_in_shards, shard_bytes
from harvest.files import locked, read_json, write_sealed
from harvest.stream import READER, Stream, save_stream
from pipeline.stream import balanced
from train.release import Release

ONE_EPOCH = "train.epochs=1"
# One row of sixteen is left out, so that the last steps read the first window again.
SHORT = (ONE_EPOCH, "train.exclude.positions=[0]", "sample.train_tokens=3072")
LIMIT = "harvest.runtime.disk_limit=5 shards"


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    """`python -m pipeline` as a process of its own."""
    command = [sys.executable, "-m", "pipeline", *arguments, "--config", str(TINY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {name.partition("/")[2]: data for name, data in contents(folder / "runs/train", "*/*/*.safetensors").items()}


def as_stream(folder: Path, *overrides: str, capacity: int = 6, turns: bool = False) -> Path:
    """Make the finished store of a folder one that is streamed to the training run of these settings."""
    reader = pipeline("path", "train", *overrides).out.split()
    directory = folder / pipeline("path", "harvest", *overrides).out.strip()
    save_stream(directory, Stream(tuple(Path(name).name for name in reader), capacity, turns))
    return directory


@pytest.fixture
def plain(fresh_folder):
    """The weights that harvest, then train give for some settings."""

    def made(*overrides: str) -> dict[str, bytes]:
        for stage in ("sample", "harvest", "train"):
            ran = pipeline(stage, *overrides)
            assert ran.status == 0, ran.out
        out = weights(fresh_folder)
        shutil.rmtree(fresh_folder / "runs")
        return out

    return made


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        (SHORT, 1),
        ((ONE_EPOCH, "harvest.hooks=[model.layers.0,model.layers.1]", "train.sweep.l1_coefficient=[1,3]"), 3),
    ],
    ids=["rows that are read twice, taking turns", "two hooks, two SAEs, two harvest workers"],
)
def test_the_bytes_of_harvest_then_train(fresh_folder, plain, overrides, processes):
    expected = plain(*overrides)
    limit = "harvest.runtime.disk_limit=6 shards" if processes > 1 else LIMIT
    workers = ["--processes", str(processes), *(["--harvest-processes", "2"] if processes > 1 else [])]
    process = start("stream", *overrides, limit, *workers, cwd=fresh_folder)
    shards = 0
    while process.poll() is None:
        shards = max(shards, len(list(fresh_folder.glob("runs/harvest/*/store/train/row/token_id/c/*"))))
        time.sleep(0.02)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert weights(fresh_folder) == expected
    assert 0 < shards <= int(limit.partition("=")[2].split()[0])
    store = ActivationStore.open(only(fresh_folder, "runs/harvest/*/store"))
    assert store.complete_shards("train") == set() and store.complete_shards("holdout") == {0, 1}
    assert "harvest   complete" in output and "train     complete" in output
    summary = json.loads(only(fresh_folder, "runs/harvest/*/manifest.json").read_text())["summary"]
    assert len(summary["streamed_to"].split(", ")) == len(list(fresh_folder.glob("runs/train/*")))
    assert summary["waited_for_training_seconds"] > 0 or processes > 1  # there is room for all


def test_training_that_follows_waits_for_the_harvest(finished, fresh_folder):
    """The store stays whole, so several epochs are no matter."""
    assert pipeline("sample").status == 0
    with start("train", "--follow", cwd=fresh_folder) as training:
        directory = fresh_folder / pipeline("path", "harvest").out.strip()
        while not streams.is_locked(directory, READER) and training.poll() is None:
            time.sleep(0.02)
        assert pipeline("harvest").status == 0
        output = training.communicate(timeout=120)[0]
    assert training.returncode == 0, output
    assert weights(fresh_folder) == weights(finished)
    assert ActivationStore.open(directory / "store").consumed() == 0


def test_following_without_a_harvest_ends(fresh_folder, monkeypatch):
    monkeypatch.setattr(streams, "GRACE_SECONDS", 0.2)
    assert "the sample stage for these settings is not complete" in pipeline("train", "--follow").out
    assert pipeline("sample").status == 0
    ran = pipeline("train", "--follow")
    assert ran.status == 1
    assert "holds no store, and no harvest has run" in ran.out and "start `make harvest` beside this" in ran.out
    assert "run `make harvest`" in pipeline("train").out


def test_a_harvest_that_died_while_training_follows(run_folder, monkeypatch):
    """It ends with a message, and goes on when the harvest has."""
    monkeypatch.setattr(streams, "GRACE_SECONDS", 0.2)
    directory = only(run_folder, "runs/harvest/*")
    expected = weights(run_folder)
    shutil.rmtree(run_folder / "runs/train")
    (directory / "manifest.json").unlink()
    for shard in (4, 5):
        (directory / f"store/train/shards/{shard:05d}.json").unlink()
    ran = pipeline("train", "--follow")
    assert ran.status == 1
    assert "the harvest has not run for" in ran.out and "start it again" in ran.out
    assert pipeline("harvest").status == 0
    assert pipeline("train", "--follow").status == 0
    assert weights(run_folder) == expected


def test_training_deletes_what_it_has_read(finished, run_folder):
    shutil.rmtree(run_folder / "runs/train")
    whole = pipeline("train", ONE_EPOCH)
    assert whole.status == 0, whole.out
    expected = weights(run_folder)
    shutil.rmtree(run_folder / "runs/train")
    directory = as_stream(run_folder, ONE_EPOCH)
    assert pipeline("train", ONE_EPOCH).status == 0
    assert weights(run_folder) == expected
    store = ActivationStore.open(directory / "store")
    assert store.consumed() == 6 and not list((directory / "store/train/row/token_id/c").iterdir())
    assert json.loads((directory / "store/train/shards/00003.json").read_text())["consumed"] is True
    # Each command on what is left.
    ran = pipeline("verify", ONE_EPOCH)
    assert ran.status == 0 and "6 training shards are not there: training beside the harvest" in ran.out
    assert "is a stream for" in pipeline("train", "train.lr=1e-4").out
    ran = pipeline("train", ONE_EPOCH, "--force", "--yes")
    assert ran.status == 1 and "has read its training rows and deleted them" in ran.out
    assert "harvest   complete" in pipeline("harvest", ONE_EPOCH).out


def test_an_evaluation_after_a_stream_reads_the_model_where_rows_are_gone(run_folder):
    shutil.rmtree(run_folder / "runs/train")
    as_stream(run_folder, ONE_EPOCH)
    contexts = ("evaluate.reason_score.contexts=40", "evaluate.steering=null", "evaluate.features.count=1")
    assert pipeline("train", ONE_EPOCH).status == 0
    ran = pipeline("evaluate", ONE_EPOCH, *contexts)
    assert ran.status == 0, ran.out
    directory = run_folder / pipeline("path", "evaluate", ONE_EPOCH, *contexts).out.strip()
    (figures,) = json.loads((directory / "metrics.json").read_text())["saes"].values()
    assert figures["reason_score"]["rows_from"] == "model" and figures["reason_score"]["contexts_of_training"] > 0


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 6])
def test_a_kill_between_two_deletions(run_folder, monkeypatch, calls):
    """The record says consumed, the files are there still: the next start deletes them, and gives the same SAE."""
    shutil.rmtree(run_folder / "runs/train")
    assert pipeline("train", *SHORT[:2], "train.training_tokens=1408", "train.epochs=null").status == 0
    settings = (*SHORT[:2], "train.training_tokens=1408", "train.epochs=null")
    expected = weights(run_folder)
    shutil.rmtree(run_folder / "runs/train")
    directory = as_stream(run_folder, *settings)
    consume, done = ActivationStore.consume, []

    def killed(self, shard):
        done.append(shard)
        if len(done) == calls:
            delete, self.files.delete = self.files.delete, lambda name: None  # noqa: F841
            consume(self, shard)
            raise KeyboardInterrupt
        consume(self, shard)

    monkeypatch.setattr(ActivationStore, "consume", killed)
    assert pipeline("train", *settings).status == 130
    monkeypatch.undo()
    monkeypatch.chdir(run_folder)
    ran = pipeline("train", *settings)
    assert ran.status == 0, ran.out
    assert weights(run_folder) == expected
    assert not list((directory / "store/train/row/token_id/c").iterdir())


def test_the_order_of_a_deletion(run_folder, monkeypatch):
    """First a checkpoint past the window, then marks on those before it, then record, then files."""
    shutil.rmtree(run_folder / "runs/train")
    directory = as_stream(run_folder, ONE_EPOCH)
    consume, seen = ActivationStore.consume, []
    folder = run_folder / pipeline("path", "train", ONE_EPOCH).out.strip()

    def watched(self, shard):
        checkpoints = [json.loads(p.read_text()) for p in sorted(folder.glob("*/checkpoints/*/checkpoint.json"))]
        windows = [c["position"]["window"] for c in checkpoints if not c.get("weights_only")]
        finished = (directory / "stream_done.json").exists()
        seen.append(finished or (windows and min(windows) > shard // 2))
        consume(self, shard)

    monkeypatch.setattr(ActivationStore, "consume", watched)
    assert pipeline("train", ONE_EPOCH, "train.runtime.checkpoint_every=2").status == 0
    assert len(seen) >= 6 and all(seen)


def test_an_older_checkpoint_holds_weights_only(run_folder, monkeypatch):
    shutil.rmtree(run_folder / "runs/train")
    as_stream(run_folder, ONE_EPOCH)
    settings = (ONE_EPOCH, "train.runtime.checkpoint_every=2")
    steps = []

    def interrupt(self):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt

    original = Release._release
    monkeypatch.setattr(Release, "_release", lambda self: (original(self), interrupt(self)))
    while pipeline("train", *settings).status != 130:
        pass
    monkeypatch.undo()
    monkeypatch.chdir(run_folder)
    directory = run_folder / pipeline("path", "train", ONE_EPOCH).out.strip()
    for path in directory.glob("*/checkpoints/*/checkpoint.json"):
        write_sealed(path, read_json(path) | {"weights_only": True})
    if list(directory.glob("*/checkpoints/*/checkpoint.json")):
        ran = pipeline("train", *settings)
        assert ran.status == 1 and "holds weights only" in ran.out


def test_the_harvest_stops_at_its_limit_without_a_reader(fresh_folder, monkeypatch):
    monkeypatch.setattr(streams, "GRACE_SECONDS", 0.2)
    assert pipeline("sample").status == 0
    directory = as_stream(fresh_folder, ONE_EPOCH, capacity=4)
    ran = pipeline("harvest")
    assert ran.status == 1 and "no training has followed for" in ran.out and "nothing is lost" in ran.out
    store = ActivationStore.open(directory / "store")
    assert store.recorded_shards("train") == {0, 1, 2, 3} and store.recorded_shards("holdout") == {0, 1}
    ran = pipeline("train", ONE_EPOCH)  # two windows, then it waits for the third
    assert ran.status == 1 and "the harvest has not run for" in ran.out
    assert store.consumed() == 2


def test_a_slow_reader_holds_the_harvest_up(finished, fresh_folder):
    """Each started by hand; both end."""
    assert pipeline("sample").status == 0
    directory = as_stream(fresh_folder, ONE_EPOCH, capacity=5)
    with start("harvest", cwd=fresh_folder) as harvest:
        ran = pipeline("train", ONE_EPOCH)
        output = harvest.communicate(timeout=120)[0]
    assert (harvest.returncode, ran.status) == (0, 0), (output, ran.out)
    assert (directory / "stream_done.json").exists()


def test_settings_that_a_stream_cannot_serve(fresh_folder):
    def refused(*overrides: str) -> str:
        ran = pipeline("stream", *overrides)
        assert ran.status == 1 and not list(fresh_folder.glob("runs/harvest/*/stream.json")), ran.out
        return ran.out

    assert "train.epochs: 4.0: a stream deletes rows once they were read" in refused(LIMIT)
    assert "train.training_tokens: 9,999" in refused(LIMIT, "train.epochs=null", "train.training_tokens=9999")
    assert "s3://bucket/a: a stream bounds a local disk" in refused(
        LIMIT, ONE_EPOCH, "harvest.runtime.store=s3://bucket/a"
    )
    assert "harvest.runtime.disk_limit: not set: a stream needs it, at least two windows" in refused(ONE_EPOCH)
    said = refused(ONE_EPOCH, "harvest.runtime.disk_limit=4 shards")
    assert "room for 4 shards" in said and "one shard a worker, 5 shards = " in said
    assert "--harvest-processes 3: of --processes 3" in refused(
        ONE_EPOCH, LIMIT, "--processes", "3", "--harvest-processes", "3"
    )
    ran = pipeline("stream", ONE_EPOCH, "harvest.runtime.disk_limit=many")
    assert ran.status == 2 and "harvest.runtime.disk_limit: 'many'" in ran.out


def test_another_training_run_may_not_join_a_stream(run_folder):
    shutil.rmtree(run_folder / "runs/train")
    directory = as_stream(run_folder, ONE_EPOCH)
    with locked(directory, READER):
        assert "another process is running this reader" in pipeline("train", ONE_EPOCH).out
    assert pipeline("train", ONE_EPOCH).status == 0
    (directory / "manifest.json").unlink()
    ran = pipeline("stream", ONE_EPOCH, LIMIT, "train.lr=2e-3")
    assert ran.status == 1 and "which has deleted rows already" in ran.out and "harvest --force" in ran.out
    (directory / "stream.json").write_text("{}")
    assert "does not describe a stream; it was damaged" in pipeline("train", ONE_EPOCH, "--force", "--yes").out


def test_exclusions_that_leave_too_few_rows_are_known_at_the_start(run_folder):
    shutil.rmtree(run_folder / "runs/train")
    settings = (ONE_EPOCH, "train.exclude.positions=[0,1,2,3,4,5,6]")
    as_stream(run_folder, *settings)
    ran = pipeline("train", *settings)
    assert ran.status == 1 and "train.exclude: leaves out 224 of the 512 rows of the first window" in ran.out
    assert ActivationStore.open(only(run_folder, "runs/harvest/*/store")).consumed() == 0


def test_while_the_harvest_has_its_turn_training_rests(run_folder):
    directory = as_stream(run_folder, ONE_EPOCH, turns=True)
    store = ActivationStore.open(directory / "store")
    follower = streams.Follower(directory, store, streams.load_stream(directory), lambda text: None)
    assert not follower.harvest_has_turn()  # all is written
    store.forget("train", 5)
    follower = streams.Follower(directory, store, streams.load_stream(directory), lambda text: None)
    with locked(directory, streams.ROLE):
        assert follower.harvest_has_turn()
    assert not follower.harvest_has_turn()  # it has died; training goes on with what there is
    waits = threading.Thread(target=follower.wait_for, args=(4, 6))
    waits.start()
    follower.stop()
    waits.join(5)
    assert not waits.is_alive()


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


def test_what_a_shard_takes_is_counted_with_its_record(finished):
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    names = [*store.shard_files("train", 0), "train/shards/00000.json"]
    blocks = sum(-(-(store.files.size(name) or 0) // 4096) * 4096 for name in names)
    assert shard_bytes(store.geometry) == blocks


def test_the_slower_side_gets_more_processes():
    assert balanced(8, 7.0, 1.0) == 7 and balanced(8, 1.0, 1.0) == 4 and balanced(8, 1.0, 9.0) == 1
    assert balanced(4, 3.0, 1.0) == 3
