"""Whole runs of each kind of SAE: in a sweep on a stream, killed, exported; always the SAE that it is alone."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import sae_lens
import torch
from conftest import contents, only, pipeline, start

from harvest.activation_store import ActivationStore
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.dataloader import heldout_rows
from train.saelens import write_saelens_folder
from train.trainer import Trainer

HOOK, WEIGHTS = "model.layers.1", "sae_weights.safetensors"
OWN = {
    "topk": ("k=2", "dead_after=512"),
    "batchtopk": ("k=2", "dead_after=512"),
    "matryoshka": ("k=2", "dead_after=512", "prefixes=[1,40,128]"),
    "jumprelu": ("target_l0=3",),
}
SETTINGS = {
    kind: ["train.epochs=2", *(f"train.sae.{given}" for given in (f"kind={kind}", "l1_coefficient=null", *own))]
    for kind, own in OWN.items()
}
RATES = (0.001, 0.003)  # the first is the file's


def results(folder: Path) -> dict[tuple[str, float], dict[str, object]]:
    """Weights, moments and figures without timings of every training run, by its kind and lr."""
    out = {}
    for manifest in folder.glob("runs/train/*/manifest.json"):
        settings = json.loads(manifest.read_text())["settings"]
        found = contents(manifest.parent / HOOK)
        log = [json.loads(line) | {"timings": None} for line in found["metrics.jsonl"].splitlines()]
        tensors = {name: data for name, data in found.items() if name.endswith(("safetensors", "sae.json"))}
        out[settings["sae"]["kind"], settings["lr"]] = {**tensors, "log": log}
    return out


def copied(finished: Path, folder: Path, *parts: str) -> Path:
    for name in ("assets", *parts):
        shutil.copytree(finished / name, folder / name)
    shutil.copy(finished / "runs/.inputs.json", folder / "runs/.inputs.json")
    return folder


@pytest.fixture(scope="module")
def alone(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind at each lr, one at a time, from the finished run's store; read only."""
    folder = copied(finished, tmp_path_factory.mktemp("kinds"), "runs/sample", "runs/harvest")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for settings in SETTINGS.values():
            for rate in RATES:
                assert pipeline("train", *settings, f"train.lr={rate}").status == 0
    return folder


@pytest.mark.parametrize(("kind", "given"), [("topk", "mean"), ("jumprelu", "mean"), ("batchtopk", "zeros")])
def test_where_biases_start(alone, monkeypatch, kind, given):
    """At an lr that moves nothing: W_enc sees rows less the mean of the first window, or as they are."""
    monkeypatch.chdir(alone)
    still = ("train.lr=1e-30", *SETTINGS[kind], f"train.sae.b_dec_init_method={given}")
    assert pipeline("train", *still).status == 0
    (path,) = (file.parent for file in alone.glob("runs/train/*/manifest.json") if '"lr": 1e-30' in file.read_text())
    saved = load_sae(path / HOOK)
    store = ActivationStore.open(only(alone, "runs/harvest/*/store"))
    window = range(2 * store.geometry.chunks_per_shard)
    rows_BD = torch.cat([torch.from_numpy(store.read_chunk("train", HOOK, i)) for i in window]).view(torch.bfloat16)
    rows_BD = rows_BD[rows_BD.float().norm(dim=1) <= (saved.statistics.norm_limit or torch.inf)]
    mean_D = rows_BD.double().mean(0) * saved.sae.scale * (given == "mean")
    assert mean_D.abs().max() > 0.01 or given == "zeros"
    torch.testing.assert_close(saved.sae.b_dec.double(), mean_D, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(saved.sae.b_enc.double(), -mean_D @ saved.sae.W_enc.double(), rtol=1e-4, atol=1e-6)
    shutil.rmtree(path)


def run_of(folder: Path, kind: str) -> Path:
    """Directory of a kind's run at the first lr."""
    (found,) = (
        path.parent
        for path in folder.glob("runs/train/*/begun.json")
        if (settings := json.loads(path.read_text())["settings"])["sae"]["kind"] == kind and settings["lr"] == RATES[0]
    )
    return found


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_trains(alone, kind):
    log = [line for line in results(alone)[kind, RATES[0]]["log"] if line["kind"] == "train"]
    assert log[-1]["mse"] < 0.8 * log[0]["mse"]
    assert {line["kernel"] for line in log} == {"sparse"}
    assert any("aux" in line for line in log) == (kind != "jumprelu")


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_sweep_on_a_stream_gives_each_sae_as_alone(finished, alone, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(copied(finished, tmp_path, "runs/sample"))
    ran = pipeline("stream", *SETTINGS[kind], f"train.sweep.lr={list(RATES)}")
    assert ran.status == 0, ran.out
    found, expected = results(tmp_path), results(alone)
    assert set(found) == {(kind, rate) for rate in RATES}
    for key, files in found.items():
        assert files == expected[key], key
    weights = {files[WEIGHTS] for files in found.values()}
    assert len(weights) == len(RATES)


@pytest.mark.parametrize("kind", SETTINGS)
def test_kill_9_at_two_steps(finished, alone, tmp_path, monkeypatch, kind):
    folder = copied(finished, tmp_path, "runs/sample", "runs/harvest")
    monkeypatch.chdir(folder)
    original = Trainer.step
    for last in (27, 43):  # with checkpoints of steps 20 and 40

        def killed(self, rows, last=last):
            if self.step_number == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, rows)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", killed)
            process = start("train", *SETTINGS[kind], cwd=folder)
            process.join(120)
        assert process.exitcode == -signal.SIGKILL
    ran = pipeline("train", *SETTINGS[kind])
    assert ran.status == 0 and "resumes" in ran.out, ran.out
    assert results(folder)[kind, RATES[0]] == results(alone)[kind, RATES[0]]


@pytest.mark.parametrize("kind", SETTINGS)
def test_its_export_opens_in_saelens_with_equal_activations(alone, tmp_path, kind):
    saved = load_sae(run_of(alone, kind) / HOOK)
    write_saelens_folder(tmp_path / "out", saved.sae, {})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert theirs.cfg.architecture() == ("topk" if kind == "topk" else "jumprelu")
    store = ActivationStore.open(only(alone, "runs/harvest/*/store"))
    x = heldout_rows(store, HOOK, ExcludeConfig(), saved.statistics.norm_limit, 512)
    ours = saved.sae.encode(x)
    with torch.no_grad():
        f, x_hat = theirs.encode(x.float()), theirs(x.float())
    assert torch.equal(f > 0, ours > 0) and 1 < (f > 0).sum(1).float().mean() < 64
    torch.testing.assert_close(ours, f, rtol=1e-5, atol=0)
    torch.testing.assert_close(saved.sae.decode(ours), x_hat, rtol=1e-5, atol=1e-5)
