import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import PYTHONPATH, TINY, contents, only, pipeline, start
from safetensors import SafetensorError

from harvest.files import UserError, read_json, write_sealed
from train import checkpoint as checkpoints
from train.checkpoint import load_sae, newest_checkpoint
from train.config import TrainConfig
from train.trainer import Trainer
from train.training import total_steps

SAE_FILES = ("sae_weights.safetensors", "sae.json", "best/sae_weights.safetensors", "best/sae.json")


def drop_training(folder) -> None:
    shutil.rmtree(folder / "runs" / "train")
    shutil.rmtree(folder / "runs" / "evaluate")


def results(folder) -> dict[str, bytes]:
    here = only(folder, "runs/train/*/model.layers.1")
    return {name: (here / name).read_bytes() for name in SAE_FILES}


def log(folder) -> list[dict]:
    lines = only(folder, "runs/train/*/model.layers.1/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timings"} for line in lines]


def test_the_log_and_the_last_checkpoint(finished):
    lines = log(finished)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [*range(5, 96, 5), 96]
    assert train[0]["l1_coefficient"] == pytest.approx(4 / 5)  # warm-up of 5 of 96 steps, the fifth step
    assert train[-1]["lr"] == pytest.approx(1e-3 / 19)
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [*range(10, 96, 10), 96]
    folder = only(finished, "runs/train/*/model.layers.1/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["00000060", "00000080"]


def test_the_best_sae_has_the_least_heldout_loss(finished):
    validation = [line for line in log(finished) if line["kind"] == "validation"]
    best = min(validation, key=lambda line: line["loss"])
    assert load_sae(only(finished, "runs/train/*/model.layers.1/best")).about["step"] == best["step"]


@pytest.mark.parametrize("at", [1, 33, 60, 94])
def test_interrupted_and_resumed_gives_the_same_bytes(finished, run_folder, monkeypatch, at):
    drop_training(run_folder)
    original = Trainer.step

    def interrupted(self, rows):
        if self.step_number == at:
            signal.raise_signal(signal.SIGTERM if at % 2 else signal.SIGINT)
        return original(self, rows)

    monkeypatch.setattr(Trainer, "step", interrupted)
    ran = pipeline("train")
    assert ran.status == 130
    found = newest_checkpoint(only(run_folder, "runs/train/*/model.layers.1/checkpoints"))
    assert found
    assert found[0].step == at + 1  # the step in hand was finished
    assert "would resume" in pipeline("status").out
    monkeypatch.setattr(Trainer, "step", original)
    ran = pipeline("train")
    assert ran.status == 0, ran.out
    assert results(run_folder) == results(finished)
    assert log(run_folder) == log(finished)


def test_killed_and_resumed_gives_the_same_bytes(finished, run_folder):
    drop_training(run_folder)
    process = start("train", "train.runtime.checkpoint_every=1", cwd=run_folder)
    deadline = time.monotonic() + 60
    while not list(run_folder.glob("runs/train/*/*/checkpoints/0000000[3-9]")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    ran = pipeline("train")
    assert ran.status == 0, ran.out
    assert "resumes" in ran.out
    assert results(run_folder) == results(finished)
    assert log(run_folder) == log(finished)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(finished, run_folder, monkeypatch):
    drop_training(run_folder)
    original = checkpoints.safetensors.torch.save_file
    saved = []

    def full(tensors, path, *rest):
        if len(tensors) > 4:
            saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return original(tensors, path, *rest)

    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", full)
    ran = pipeline("train")
    assert ran.status == 1
    assert "tensors.safetensors: No space left on device" in ran.out
    assert "run the same command again" in ran.out
    folder = only(run_folder, "runs/train/*/model.layers.1/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["00000020", "00000040"]
    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", original)
    assert pipeline("train").status == 0
    assert results(run_folder) == results(finished)


def test_a_damaged_checkpoint_is_named(run_folder):
    folder = only(run_folder, "runs/train/*/model.layers.1/checkpoints")
    tensors = folder / "00000080" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00000080: damaged .* resume from the one before it, 00000060"):
        newest_checkpoint(folder)
    marker = folder / "00000080" / "checkpoint.json"
    marker.write_text(marker.read_text().replace('"step": 80', '"step": 81'))
    with pytest.raises(
        UserError, match=r"its own checksum.* delete .*00000080 to resume from the one before it, 0{6}60"
    ):
        newest_checkpoint(folder)
    marker.unlink()
    found = newest_checkpoint(folder)
    assert found
    assert found[0].step == 60


def test_an_incomplete_or_damaged_store_is_an_error(run_folder):
    drop_training(run_folder)
    store = only(run_folder, "runs/harvest/*/store")
    record = store / "train/shards/00002.json"
    kept = record.read_bytes()
    record.unlink()
    ran = pipeline("train")
    assert ran.status == 1
    assert "incomplete: 1 of 6 train shards are missing, first 2" in ran.out
    record.write_bytes(kept)
    acts = store / "train/model.layers.1/acts/c/2/0"
    data = bytearray(acts.read_bytes())
    data[100] ^= 1
    acts.write_bytes(data)
    ran = pipeline("train")
    assert ran.status == 1
    assert "acts/c/2/0: damaged" in ran.out


def test_training_without_a_harvest_says_what_to_run(fresh_folder):
    assert fresh_folder.exists()
    ran = pipeline("train")
    assert ran.status == 1
    assert "the harvest stage for these settings is not complete" in ran.out
    assert "`make harvest`" in ran.out


def test_a_loss_that_is_no_number_stops(run_folder):
    ran = pipeline("train", "train.lr=1e30")
    assert ran.status == 1
    assert "the loss is NaN or infinite at step" in ran.out
    assert not list(run_folder.glob("runs/train/*/manifest.json"))[1:]


@pytest.mark.parametrize("checkpoint_every", [20, 1])
def test_a_bad_step_is_named_with_its_rows_and_keeps_the_weights(run_folder, monkeypatch, checkpoint_every):
    drop_training(run_folder)
    original = Trainer.step

    def spoiled(self, rows):
        return original(self, rows * float("nan") if self.step_number == 62 else rows)

    monkeypatch.setattr(Trainer, "step", spoiled)
    ran = pipeline("train", f"train.runtime.checkpoint_every={checkpoint_every}")
    assert ran.status == 1
    assert "the loss is NaN or infinite at step 63;" in ran.out  # found at step 65, when the log is written
    assert re.search(r"largest norms: context \d+ position \d+ \(token \d+, norm", ran.out)
    found = newest_checkpoint(only(run_folder, "runs/train/*/model.layers.1/checkpoints"))
    assert found
    assert found[0].step == (62 if checkpoint_every == 1 else 60)  # none of a step that is not known to be good


def test_a_checkpoint_that_is_there_is_not_written_again(run_folder, monkeypatch):
    folder = only(run_folder, "runs/train/*/model.layers.1/checkpoints")
    found = newest_checkpoint(folder)
    assert found
    (folder / "00000777").mkdir()  # of a process that was killed

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save_tensors", full)
        checkpoints.save_checkpoint(folder, *found, keep_last=1)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_checkpoint(folder, found[0]._replace(step=99), found[1], keep_last=1)
    assert sorted(path.name for path in folder.iterdir()) == ["00000060", "00000080"]
    assert newest_checkpoint(folder)


def test_a_spike_stops_unless_told_otherwise(run_folder, monkeypatch):
    drop_training(run_folder)
    original = Trainer.step

    def spiked(self, rows):
        return original(self, rows * 30 if self.step_number == 94 else rows)

    monkeypatch.setattr(Trainer, "step", spiked)
    settings = ["train.runtime.log_every=1"]
    ran = pipeline("train", *settings)
    assert ran.status == 1
    assert re.search(r"the loss rose to \S+ at step 95, from \S+;", ran.out)
    again = pipeline("train", *settings)  # from step 80: the losses before it are remembered
    assert again.status == 1
    assert "at step 95, from" in again.out
    assert pipeline("train", *settings, "train.runtime.spike_factor=null").status == 0


def test_figures_go_to_tensorboard_too(finished, run_folder):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drop_training(run_folder)
    ran = pipeline("train", "train.runtime.tracker=tensorboard")
    assert ran.status == 0, ran.out
    events = EventAccumulator(str(only(run_folder, "runs/train/*/model.layers.1/tensorboard")))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/l0")}
    assert logged == pytest.approx({line["step"]: line["l0"] for line in log(finished) if line["kind"] == "train"})
    assert results(run_folder) == results(finished)


def test_a_tracker_that_is_not_installed(run_folder, monkeypatch):
    drop_training(run_folder)
    monkeypatch.setitem(sys.modules, "trackio", None)
    ran = pipeline("train", "train.runtime.tracker=trackio")
    assert ran.status == 1
    assert "train.runtime.tracker: 'trackio': trackio is not installed" in ran.out


def test_a_tracker_that_does_not_start(run_folder, monkeypatch):
    def start(_self):
        raise OSError("no such account")

    drop_training(run_folder)
    monkeypatch.setattr(TensorBoardTracker, "start", start)
    ran = pipeline("train", "train.runtime.tracker=tensorboard")
    assert ran.status == 1
    assert "train.runtime.tracker: 'tensorboard' does not start: no such account; null takes it away" in ran.out


def test_exclusions_that_leave_nothing(run_folder):
    assert run_folder.exists()
    ran = pipeline("train", f"train.exclude.positions={list(range(16))}".replace(" ", ""))
    assert ran.status == 1
    assert "leaves no row" in ran.out


def test_saved_saes_are_checked(run_folder):
    folder = only(run_folder, "runs/train/*/model.layers.1")
    assert "tensor(" not in repr(load_sae(folder).sae)
    with pytest.raises(UserError, match=r"/sae.json: not there; an SAE's folder is runs/train/<fingerprint>/<hook>"):
        load_sae(folder.parent)
    about = read_json(folder / "sae.json")
    (folder / "sae.json").write_text(json.dumps(about | {"d_in": 31, "crc32c": 1}))
    with pytest.raises(UserError, match=r"sae.json: does not match its own checksum"):
        load_sae(folder)
    write_sealed(folder / "sae.json", about | {"d_in": 31})
    with pytest.raises(UserError, match=r"W_enc is torch.float32 \(32, 128\); float32 \(31, 128\) expected"):
        load_sae(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match=r"damaged, or not an SAE of ours \(its bytes have changed"):
        load_sae(folder)
    write_sealed(folder / "sae.json", {name: value for name, value in about.items() if name != "tensors_crc32c"})
    with pytest.raises(UserError, match="damaged, or not an SAE of ours"):
        load_sae(folder)


def test_several_hooks_train_an_sae_each(run_folder):
    """The layer-wise SAE; each is the one that its hook alone gives."""
    ran = pipeline("run", "harvest.hooks=[model.layers.1,model.layers.0]")
    assert ran.status == 0, ran.out
    assert all(f"\ntrain model.layers.{layer}: " in ran.out for layer in (0, 1))  # whose progress it is
    both = next(p for p in run_folder.glob("runs/train/*") if (p / "model.layers.0").exists())
    single = next(p for p in run_folder.glob("runs/train/*") if not (p / "model.layers.0").exists())
    weights = "model.layers.1/sae_weights.safetensors"
    assert (both / weights).read_bytes() == (single / weights).read_bytes()
    assert contents(both / "model.layers.0").keys() == contents(both / "model.layers.1").keys()


def test_steps():
    config = TrainConfig(sae={"d_sae": 8}, epochs=2.5, batch_size=64)
    assert total_steps(config, 1000) == 39
    config = TrainConfig(sae={"d_sae": 8}, training_tokens=6400, batch_size=64)
    assert total_steps(config, 10) == 100
    config = TrainConfig(sae={"d_sae": 8}, epochs=0.5, batch_size=64)
    with pytest.raises(UserError, match=r"train\.epochs: 0\.5: gives 63 of the 127 training rows, less than one batch"):
        total_steps(config, 127)


def test_bfloat16_products_train_too(run_folder):
    ran = pipeline("train", "train.compute_dtype=bfloat16")
    assert ran.status == 0, ran.out
    folders = sorted(run_folder.glob("runs/train/*/model.layers.1"), key=lambda p: p.stat().st_mtime)
    last = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in folders]
    assert abs(last[0]["explained_variance"] - last[1]["explained_variance"]) < 0.02
    assert load_sae(folders[-1]).sae.W_enc.dtype == torch.float32
    weights = folders[-1] / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for path in (folders[-1].parent / "manifest.json", folders[-1] / "sae.json", weights):
        path.unlink()
    ran = pipeline("train", "train.compute_dtype=bfloat16")
    assert "resumes" in ran.out
    assert weights.read_bytes() == whole


def test_both_kernels_are_used_and_agree(finished, run_folder):
    """The tiny run switches from dense to sparse; either alone ends at the same figures."""
    assert {line["kernel"] for line in log(finished) if line["kind"] == "train"} == {"dense", "sparse"}
    last = {}
    for kernel in ("dense", "sparse"):
        assert pipeline("train", f"train.kernel={kernel}").status == 0
        newest = max(run_folder.glob("runs/train/*/model.layers.1/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
        lines = [json.loads(line) for line in newest.read_text().splitlines()]
        assert {line["kernel"] for line in lines if line["kind"] == "train"} == {kernel}
        last[kernel] = lines[-1]
    for name in ("loss", "l0", "explained_variance"):
        assert last["dense"][name] == pytest.approx(last["sparse"][name], rel=5e-3)


def test_features_split_over_processes(run_folder):
    """Two processes of torchrun: the SAE of one up to rounding; their checkpoint goes on in one process."""
    # bfloat16 rounds by thousands of what other sums differ by; a machine may have one GPU for the two.
    where = ("train.compute_dtype=float32", "train.runtime.device=cpu")
    drop_training(run_folder)
    assert pipeline("train", *where).status == 0
    whole, whole_log = load_sae(only(run_folder, "runs/train/*/model.layers.1")).sae, log(run_folder)
    shutil.rmtree(run_folder / "runs" / "train")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", "--config", str(TINY), *where],
        cwd=run_folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train     complete") == 1
    split = load_sae(only(run_folder, "runs/train/*/model.layers.1")).sae
    for name, weight in whole.parameters.items():
        assert torch.allclose(split.parameters[name], weight, atol=1e-3)
    assert [line["step"] for line in log(run_folder)] == [line["step"] for line in whole_log]
    manifest = only(run_folder, "runs/train/*/manifest.json")
    assert json.loads(manifest.read_text())["numerics"]["ranks"] == 2
    manifest.unlink()
    for name in ("sae.json", "sae_weights.safetensors"):
        (manifest.parent / "model.layers.1" / name).unlink()
    ran = pipeline("train", *where)
    assert ran.status == 1
    assert "ranks: 2 then, 1 now" in ran.out
    assert pipeline("train", *where, "--allow-mixed").status == 0
    again = load_sae(only(run_folder, "runs/train/*/model.layers.1")).sae
    for name, weight in split.parameters.items():
        assert torch.allclose(again.parameters[name], weight, atol=1e-3)


def test_a_step_copies_the_weights_once(run_folder, monkeypatch):
    """Where the best SAE and a checkpoint are due; and at the end, which both folders have."""
    drop_training(run_folder)
    copied: list[tuple[int, str]] = []
    for name in ("tensors", "weights"):
        own = getattr(Trainer, name)
        noted = lambda self, *a, own=own, name=name: copied.append((self.step_number, name)) or own(self, *a)  # noqa: E731
        monkeypatch.setattr(Trainer, name, noted)
    assert pipeline("train").status == 0
    steps = [step for step, _ in copied]
    assert len(set(steps)) == len(steps) and {(20, "tensors"), (40, "tensors")} <= set(copied)
    folder = only(run_folder, "runs/train/*/model.layers.1")
    best = read_json(folder / "best" / "sae.json")["step"]
    assert (best, "tensors" if best % 20 == 0 and best < steps[-1] else "weights") in copied
