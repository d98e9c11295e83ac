"""Training that ends otherwise than by its last step: a bad step, signals, a checkpoint of another SAE."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import only, pipeline
from pydantic import ValidationError
from test_train import drop_training, results

from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train import checkpoint as checkpoints
from train import training
from train.checkpoint import newest_checkpoint
from train.config import SaeConfig, TrainConfig, TrainRuntime
from train.dataloader import ActivationLoader
from train.parallel import FeatureRanks
from train.run import deferred_interrupt
from train.trainer import Trainer


def test_a_bad_step_is_named_without_rows_that_are_gone(run_folder, monkeypatch):
    drop_training(run_folder)
    monkeypatch.setattr(Trainer, "step", lambda self, rows, step=Trainer.step: step(self, rows * float("nan")))

    def gone(*_rows):
        raise UserError("a stream has deleted them")

    monkeypatch.setattr(ActivationLoader, "describe", gone)
    ran = pipeline("train")
    assert ran.status == 1
    assert (
        "infinite at step 1; the last checkpoint is kept. Rows of its batch with the largest norms: unknown." in ran.out
    )


def test_a_run_that_was_killed_before_its_manifest_trains_nothing_again(finished, run_folder, monkeypatch):
    only(run_folder, "runs/train/*/manifest.json").unlink()
    monkeypatch.setattr(Trainer, "step", None)
    ran = pipeline("train")
    assert ran.status == 0, ran.out
    assert only(run_folder, "runs/train/*/manifest.json")
    assert results(run_folder) == results(finished)


@pytest.mark.parametrize(
    ("every", "minutes", "steps"),
    [
        (None, 1.5, [15, 30, 45, 60, 75, 90]),  # of steps of 7 seconds, at every fifth, when the log is written
        (30, None, [30, 60, 90]),
        (30, 4, [30, 60, 90]),  # 4 minutes are 35 steps
        (40, 3.5, [30, 40, 70, 80]),
    ],
)
def test_checkpoints_are_due_by_steps_and_by_minutes(run_folder, finished, monkeypatch, every, minutes, steps):
    drop_training(run_folder)
    now = [1000.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(self, rows, step=Trainer.step):
        now[0] += 7
        return step(self, rows)

    monkeypatch.setattr(Trainer, "step", slow)
    cadence = {"checkpoint_every": every, "checkpoint_minutes": minutes, "keep_last": 99}
    ran = pipeline("train", *(f"train.runtime.{name}={json.dumps(value)}" for name, value in cadence.items()))
    assert ran.status == 0, ran.out
    folder = only(run_folder, "runs/train/*/model.layers.1/checkpoints")
    assert sorted(int(path.name) for path in folder.iterdir()) == steps
    assert results(run_folder) == results(finished)


def test_no_cadence_of_checkpoints_is_refused():
    with pytest.raises(ValidationError, match="set checkpoint_every, checkpoint_minutes or both"):
        TrainRuntime(checkpoint_every=None)


def test_a_second_signal_does_not_wait():
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_of_another_sae_is_refused(run_folder):
    folder = only(run_folder, "runs/train/*/model.layers.1")
    found = newest_checkpoint(folder / "checkpoints")
    assert found
    checkpoint, tensors = found
    wider = tensors | {"W_dec": torch.zeros(129, 32)}
    checkpoints.save_checkpoint(folder / "checkpoints", checkpoint._replace(step=90), wider, keep_last=1)
    (folder.parent / "manifest.json").unlink()
    (folder / "sae.json").unlink()
    ran = pipeline("train")
    assert ran.status == 1
    assert "its checkpoint is of an SAE of shapes {" in ran.out and "'W_dec': (129, 32)" in ran.out
    ran = pipeline("train", "--force")
    assert ran.status == 0, ran.out


def test_a_rank_makes_its_features_alone_in_host_memory(finished, tmp_path, monkeypatch):
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    config = TrainConfig(sae=SaeConfig(d_sae=64, l1_coefficient=1.0), epochs=1, batch_size=64, pool_rows=256)
    made, new = [], training.new_sae
    monkeypatch.setattr(training, "new_sae", lambda *given: made.append(new(*given)) or made[-1])
    there = torch.device("meta"), torch.float32, FeatureRanks(1, 2)
    trainer = training.Training(config, store, "model.layers.1", tmp_path, *there).trainer
    assert [(sae.W_enc.device.type, sae.first_feature, sae.d_sae) for sae in made] == [("cpu", 32, 32)]
    assert trainer.sae.W_enc.device.type == "meta" and trainer.sae.d_sae == 32 and trainer.d_sae == 64
