"""The pretended GPU finds what it is for, and the stages on it give a CPU's figures. Run by make test-pretended."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pretended_streams
import pytest
import torch
from conftest import PYTHONPATH, TINY, pipeline

from benchmarks.gpu.check import Place
from benchmarks.gpu.stages import BOUNDS, compare, figures
from evaluate.fidelity import add_by
from evaluate.sampler import Draw, Sampling, chosen
from harvest.shard_buffer import ShardBuffer
from train.config import SaeConfig, TrainConfig
from train.kernel_choice import KernelChoice
from train.kinds import new_sae
from train.parallel import FeatureRanks
from train.step import kernels
from train.trainer import Trainer

pytestmark = pytest.mark.pretended


@pytest.fixture
def device():
    return torch.device("cuda", 0)


def test_the_figures_of_all_stages_are_those_of_a_cpu(finished, tmp_path):
    shutil.copytree(finished / "assets", tmp_path / "assets")
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PRETENDED": ""}
    subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "--config", TINY], cwd=tmp_path, env=environment, check=True
    )
    ours = figures(finished)
    assert sum(name.split()[1] in BOUNDS for name in ours) > 10
    compare(Place(tmp_path, tmp_path / "notes.jsonl"), "pretended", ours, figures(tmp_path))


def test_what_cuda_refuses_is_refused(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    index = torch.zeros(3, dtype=torch.int64)
    for work in (
        lambda: there + here,
        lambda: torch.stack([there, here]),
        lambda: there.index_add_(0, index, there),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            work()
    for work in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="to numpy"):
            work()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2] and there[torch.tensor([2])].tolist() == [1]


def test_sums_in_no_order_are_an_error_and_ours_are_not(device):
    sums, group, rows = torch.zeros(2, 3, device=device), torch.tensor([1, 0, 1]), torch.arange(9.0).view(3, 3)
    with pytest.raises(RuntimeError, match="in no order"):
        sums.index_add_(0, group.to(device), rows.to(device))
    add_by(sums, group.to(device), rows.to(device))
    assert sums.tolist() == [[3, 4, 5], [6, 8, 10]]


def test_two_streams_without_a_wait_are_an_error(device):
    rows, side = torch.ones(3, device=device), torch.cuda.Stream()
    with torch.cuda.stream(side), pytest.raises(pretended_streams.RaceError, match="another stream may still use"):
        rows.mul_(2)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        rows.mul_(2)
    with pytest.raises(pretended_streams.RaceError):
        rows.sum()
    torch.cuda.synchronize()
    rows.sum()


@pytest.mark.parametrize("fault", ["wait_stream", "record_stream"])
def test_a_fault_in_how_training_copies_its_rows_is_found(device, monkeypatch, fault):
    where = torch.Tensor if fault == "record_stream" else pretended_streams.Stream
    monkeypatch.setattr(where, fault, lambda *_: None)
    config = TrainConfig(sae=SaeConfig(d_sae=16, l1_coefficient=1.0), epochs=1)
    trainer = Trainer(new_sae(config, 8, 1.0, device), config, 10, 100, torch.float32)
    batches = [torch.ones(4, 8, dtype=torch.bfloat16).pin_memory() for _ in range(2)]
    with pytest.raises(pretended_streams.RaceError):
        list(map(trainer.step, batches))


def test_pinned_memory_is_followed(device):
    there, host = torch.arange(4.0, device=device), torch.empty(4, pin_memory=True)
    host.copy_(there, non_blocking=True)
    assert host.isnan().all()
    torch.cuda.synchronize()
    assert host.tolist() == [0, 1, 2, 3]
    sent = host.to(device, non_blocking=True)
    host.zero_()
    with pytest.raises(pretended_streams.RaceError, match="was changed before the copy from it"):
        sent.tolist()


def test_an_l0_is_read_once_it_is_there(device, monkeypatch):
    config = TrainConfig(sae=SaeConfig(d_sae=16, l1_coefficient=1.0), epochs=1)
    choice = KernelChoice(config, 16, kernels(new_sae(config, 8, 1.0, "cpu")))
    choice.note(torch.tensor(3.0, device=device))
    assert choice.state()["pending_l0"] == [3]
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda _event: None)
    choice.note(torch.tensor(4.0, device=device))
    assert str(choice.state()["pending_l0"]) == "[3.0, nan]"


def test_rows_of_a_shard_are_read_once_they_are_there(run_folder, monkeypatch):
    rows = ShardBuffer.rows

    def without(buffer):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda.Event, "synchronize", lambda _event: None)
            return rows(buffer)

    monkeypatch.setattr(ShardBuffer, "rows", without)
    ran = pipeline("harvest", "--force", "--yes")
    assert ran.status == 1 and "NaN or infinity in the activations" in ran.out


def test_a_rank_needs_memory_for_its_features_alone(device):
    d_in, d_sae = 64, 2048
    config = TrainConfig(sae=SaeConfig(d_sae=d_sae, l1_coefficient=1.0), epochs=1)
    ranks = FeatureRanks(3, 8)
    own = new_sae(config, d_in, 1.0, "cpu", ranks)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    trainer = Trainer(own, config, 10, 100, torch.bfloat16, ranks, device)
    parameters = sum(weight.numel() for weight in trainer.sae.parameters.values())
    assert parameters < d_in * d_sae / 3  # two matrices, an eighth of each
    # Weights, two moments, copies of the matrices in bfloat16, and steps since each feature fired.
    assert torch.cuda.max_memory_allocated() - before < 14.5 * parameters


def test_tokens_drawn_on_a_gpu_are_those_drawn_on_a_cpu(device):
    logits_NV = 4 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0))
    draws = [None if n % 7 == 3 else Draw((n, 5), n) for n in range(40)]
    there, here = (chosen(logits_NV.to(on), Sampling(1, 0.8), draws) for on in (device, "cpu"))
    assert [token for token, draw in zip(there, draws, strict=True) if draw] == [
        t for t, d in zip(here, draws, strict=True) if d
    ]
    assert len(set(there)) > 10
