"""The checks for a GPU: the cheapest on a CPU, how a failure is told, and what the stages import."""

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from benchmarks.gpu import full_training, harvest, kernels, stages, training, wheels
from benchmarks.gpu.__main__ import NOT_RUN, Check, main, run_check, table, verdict
from benchmarks.gpu.check import FULL, ROOT, Place
from harvest import device
from harvest.device import has_bfloat16, numerics, resolve_device, resolve_dtype
from harvest.files import is_out_of_memory
from pipeline.config import load
from train.config import KINDS
from train.nonzeros import PLAIN
from train.sparse_step import operations_for
from train.step import Kernel
from train.step import kernels as kernels_of

CUDA = torch.device("cuda")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the kernels that are checked run

INTERPRETED = find_spec("triton") is not None and Version(version("triton")) >= Version("3.9")


def case(kind: str) -> kernels.Case:
    return kernels.lattice(kind, 5, 85, 131, DEVICE, 1.0)


@pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="no triton whose interpreter runs with NumPy 2.4")
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_of_every_kind_equal_float64s(kind):
    assert kernels.check_kind(kind, case(kind))["l0"] > 1


def test_a_wrong_gradient_is_found(monkeypatch):
    of_kind = type(case("standard").sae)
    right = kernels_of(case("standard").sae)["dense"]

    def wrong(*arguments, **options):
        result = right.step(*arguments, **options)
        result.gradients["W_dec"][7] *= 1.1
        return result

    monkeypatch.setattr(of_kind, "kernels", {"dense": Kernel(wrong, right.reconstruction)})
    with pytest.raises(AssertionError, match=r"dense float32 .* W_dec is "):
        kernels.check_kind("standard", case("standard"))


def test_a_lattice_is_exact_in_bfloat16():
    sae, stored_BD = case("standard")
    x_BD = sae.scaled(stored_BD)
    exact = x_BD.double() @ sae.W_enc.double()
    assert torch.equal((x_BD.bfloat16() @ sae.W_enc.bfloat16()).double(), exact)
    z_BF = exact + sae.b_enc.double()
    assert z_BF.abs().min() > 1e-7 and all(len(row.unique()) == len(row) for row in z_BF)
    assert not x_BD[3].any() and not (z_BF[:, 1] > 0).any()


def test_differences_between_runs_are_named():
    one = {"checkpoints/25": "a", "weights": "b", "metrics": "c"}
    assert training.differences(one, dict(one)) == []
    assert training.differences(one, {"checkpoints/25": "x", "weights": "b"}) == ["checkpoints/25", "metrics"]


def test_a_failed_check_is_told_whole_and_its_figures_stay(tmp_path, monkeypatch, capsys):
    popen = subprocess.Popen

    def ended(body, seconds=1.5):
        def started(arguments, **options):
            notes = arguments[arguments.index("--notes") + 1]
            code = f"import pathlib, time; pathlib.Path({notes!r}).write_text('{{\"l0\": 3.5}}\\n'); {body}"
            return popen([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "Popen", started)
        return run_check(Check("harvest", seconds, "says"), 1.5, tmp_path, tmp_path)

    failed, late, passed = map(ended, ("1/0", "time.sleep(60)", "0"))
    cut_off = ended("time.sleep(60)", seconds=9)
    assert failed["status"] == "failed, exit 1" and "ZeroDivisionError" in failed["error"]
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert late["status"].startswith("out of time") and late["figures"] == {"l0": 3.5} and late["seconds"] < 30
    assert passed["status"] == "passed" and "error" not in passed
    assert "| harvest | out of time after 2 s |" in table([failed, late, passed], "a machine")
    assert cut_off["status"].startswith("cut off")
    assert verdict([passed, {**failed, "check": "steps"}, cut_off], True) == "failed: steps; no time left for: harvest"
    assert verdict([late], True) == "failed: harvest"
    not_run = {"check": "suite", "status": NOT_RUN}
    assert verdict([passed, not_run], False) == "no time left for: suite" and not verdict([passed, not_run], True)
    assert "no time left for: suite" in capsys.readouterr().out
    assert not verdict([passed], False)


def test_a_check_that_needs_more_gpus_is_told_and_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--only", "offsets", "--out", str(tmp_path)])
    main()
    assert "not shown here: offsets (needs a GPU)" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.jsonl").read_text())["status"] == "could not be run: needs a GPU"


# On an NVIDIA H200 (benchmarks/results.md): the largest of torch.cuda.max_memory_allocated of the runs of a check.
@pytest.mark.parametrize(
    ("kind", "d_sae", "peak"),
    [
        ("standard", 65_536, 10_975_248_896),
        ("standard", 16_384, 3.32e9),
        ("topk", 4096, 1.24e9),
        ("batchtopk", 4096, 1.24e9),
        ("jumprelu", 4096, 1.06e9),
        ("matryoshka", 4096, 2.18e9),
    ],
)
def test_the_estimate_of_trainings_memory_is_near_what_was_measured(kind, d_sae, peak, tmp_path):
    place = Place(tmp_path, tmp_path / "notes")
    place.sizes = FULL
    about = training.settings(kind, d_sae, place)
    assert peak / full_training.estimated(place, about) == pytest.approx(1, abs=0.1)


def test_the_model_of_the_harvest_check_has_the_layers_that_are_compiled():
    made = harvest.model(compiled=False)
    assert len(made.layers) == harvest.LAYER + 1 and made.modules[harvest.HOOK] is made.layers[-1]


def test_figures_are_kept_as_they_come(tmp_path):
    place = Place(tmp_path, tmp_path / "notes")
    place.note(a=1)
    place.note(b={"c": 0.5})
    assert [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()] == [{"a": 1}, {"b": {"c": 0.5}}]


def test_settings_of_the_default_s_shape_are_valid():
    config = load(Path(stages.CONFIG), [*stages.FLOAT32, *stages.SHAPED])
    default = load(ROOT / "configs" / "smollm2.yaml", [])
    assert config.train.sae.width(stages.SHAPE["hidden_size"]) == default.train.sae.width(576)


def test_the_stages_import_neither_datasets_nor_gguf():
    code = (
        "import sys, harvest.run, train.run, evaluate.run, pipeline.cli\n"
        "print([name for name in ('datasets', 'gguf') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_wheel_has_a_version():
    assert all("==" in line for line in wheels.requirements()) and len(wheels.requirements()) >= 8


@pytest.mark.parametrize(
    ("said", "is_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),  # pinned memory
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_all_errors_of_a_gpus_memory_are_told_as_such(said, is_memory):
    assert is_out_of_memory(RuntimeError(said)) == is_memory
    assert not is_out_of_memory(ValueError(said))


def test_float32_is_float32_on_a_gpu_and_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("current_device", 0), ("get_device_capability", (8, 0)), ("get_device_name", "A GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda _device=None, value=value: value)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
        torch.backends.cudnn.allow_tf32 = True
        assert resolve_device("cpu").type == "cpu" and torch.get_float32_matmul_precision() == "high"
        assert resolve_device("auto") == torch.device("cuda", 0)
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    monkeypatch.setattr(device, "version", lambda name: f"{name} 3.6")
    recorded = numerics(CUDA, torch.bfloat16, ranks=2)
    assert recorded["triton"] == "triton 3.6" and recorded["float32_products"] == "highest" and recorded["ranks"] == 2
    assert numerics(torch.device("cpu"), torch.float32).keys() == {"device", "torch", "compute_dtype"}


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_bfloat16_and_kernels_begin_with_ampere(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    assert resolve_dtype("auto", CUDA) == dtype and has_bfloat16(CUDA) == (dtype == torch.bfloat16)
    if dtype == torch.float32:
        assert operations_for(CUDA) is PLAIN
    else:
        pytest.importorskip("triton")
        assert operations_for(CUDA) is not PLAIN
