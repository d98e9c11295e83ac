import json
import re
import sys

import pytest
from conftest import contents, pipeline

from train.config import SaeConfig, SweepConfig, TrainConfig
from train.trainer import Trainer

SWEEP = "train.sweep.l1_coefficient=[0.5,1,2]"


def folders(folder) -> dict[float, dict[str, bytes]]:
    """Results of every training run by its l1_coefficient, without timings."""
    out = {}
    for manifest in folder.glob("runs/train/*/manifest.json"):
        coefficient = json.loads(manifest.read_text())["settings"]["sae"]["l1_coefficient"]
        found = contents(manifest.parent / "model.layers.1")
        lines = [json.loads(line) for line in found.pop("metrics.jsonl").splitlines()]
        found = {name: data for name, data in found.items() if name.endswith(("safetensors", "sae.json"))}
        out[coefficient] = found | {"log": [line | {"timings": None} for line in lines]}
    return out


def test_each_sae_of_a_sweep_is_the_one_trained_alone(run_folder):
    for coefficient in (0.5, 2):
        assert pipeline("train", f"train.sae.l1_coefficient={coefficient}").status == 0
    alone = folders(run_folder)
    ran = pipeline("train", SWEEP, "--force", "--yes")
    assert ran.status == 0, ran.out
    assert ran.out.count("train     complete") == 3
    together = folders(run_folder)
    assert together.keys() == alone.keys() == {0.5, 1, 2}
    for coefficient, found in together.items():
        assert found == alone[coefficient], coefficient


class Opened:
    """Files of stored training rows that Python opens, while it is the context; a hook that audits stays for good."""

    def __init__(self):
        self.paths, self.counts = [], False
        sys.addaudithook(self.note)

    def note(self, event, arguments):
        if self.counts and event == "open" and re.search(r"/train/[^/]+/acts/c/", str(arguments[0])):
            self.paths.append(str(arguments[0]))

    def __enter__(self):
        self.paths, self.counts = [], True
        return self

    def __exit__(self, *_error):
        self.counts = False


def test_a_sweep_reads_the_store_once(run_folder):
    opened = Opened()
    with opened:
        assert pipeline("train", "train.seed=7").status == 0
    alone = opened.paths
    assert len(alone) >= 6 * 4  # shards, epochs
    with opened:
        assert pipeline("train", "train.seed=8", SWEEP).status == 0
    assert 0.8 < len(opened.paths) / len(alone) < 1.2  # for three SAEs; pools ahead are read or not when it ends


def test_saes_that_were_left_at_different_steps_catch_up(run_folder, monkeypatch):
    def stop_at(step):
        original = Trainer.step

        def stopped(self, rows):
            if self.step_number == step:
                raise KeyboardInterrupt
            return original(self, rows)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", stopped)
            return pipeline("train", "train.seed=3", "train.sae.l1_coefficient=2")

    assert pipeline("train", "train.seed=3", SWEEP).status == 0
    whole = folders(run_folder)
    for path in run_folder.glob("runs/train/*"):
        if json.loads((path / "begun.json").read_text())["settings"]["seed"] == 3:
            (path / "manifest.json").unlink()
            for name in ("sae.json", "metrics.jsonl"):
                (path / "model.layers.1" / name).unlink()
            for checkpoint in path.glob("*/checkpoints/*/*"):
                checkpoint.unlink()
    assert stop_at(50).status == 130
    assert pipeline("train", "train.seed=3", SWEEP).status == 0
    assert folders(run_folder) == whole


def test_status_path_and_reports_of_a_sweep(run_folder):
    assert len(pipeline("path", "train", SWEEP).out.splitlines()) == 3
    assert len(pipeline("path", "harvest", SWEEP).out.splitlines()) == 1
    lines = pipeline("status", SWEEP).out.splitlines()
    assert [line.split()[0] for line in lines] == ["sample", "harvest", *["train"] * 3, *["evaluate"] * 3][: len(lines)]
    assert sum("l1_coefficient: 1 -> " in line for line in lines) == 2
    ran = pipeline("run", SWEEP, "train.seed=9", "evaluate.downstream=null")
    assert ran.status == 0
    assert sum(line.endswith("report.html") for line in ran.out.splitlines()) == 3


def test_settings():
    config = TrainConfig(sae=SaeConfig(d_sae=8), epochs=1, sweep=SweepConfig(l1_coefficient=(2, 5), d_sae=(8, 16)))
    single = [(c.sae.l1_coefficient, c.sae.d_sae, c.sweep) for c in config.expanded()]
    assert single == [(2, 8, None), (2, 16, None), (5, 8, None), (5, 16, None)]
    with pytest.raises(ValueError, match=r"sweep\.d_sae needs sae\.d_sae"):
        TrainConfig(sae=SaeConfig(expansion_factor=2), epochs=1, sweep=SweepConfig(d_sae=(8,)))
    with pytest.raises(ValueError, match="names a value twice"):
        SweepConfig(lr=(1e-3, 1e-3))
