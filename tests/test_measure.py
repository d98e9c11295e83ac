"""What `pipeline estimate` makes of the seconds that it measures: the clock is the test's."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from harvest.files import UserError
from pipeline import measure
from pipeline.architecture import find_architecture
from pipeline.config import load
from pipeline.sizes import sizes

CPU = torch.device("cpu")
SECONDS = 0.25  # that everything takes


@pytest.fixture
def fixed(monkeypatch):
    """Everything takes SECONDS, and is small."""
    monkeypatch.setattr(measure, "_fastest", lambda _action, _device: SECONDS)
    monkeypatch.setattr(measure, "DISK_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "PRODUCT_FLOP", {"cpu": 8 * 32 * 32 * 20.5})  # 20 rows
    monkeypatch.setattr(measure, "WEIGHT_BYTES", 5 * 4 * 32 * 32 * 2 + 1)  # five matrices in bfloat16


@pytest.mark.parametrize("compiled", [False, True])
def test_rates_are_of_the_work_that_was_timed(fresh_folder, monkeypatch, fixed, compiled):
    wide = ["train.sae.d_sae=500", "train.sae.expansion_factor=null"]
    config = load(TINY, [*wide, f"harvest.compile={str(compiled).lower()}", "harvest.compute_dtype=float32"])
    s = sizes(config, find_architecture(config.model, offline=True))
    monkeypatch.setattr(measure, "STEP_FLOP", {"cpu": 10 * config.train.batch_size * 32 * 80.5})  # 80 features
    found = measure.measure(config, s, Path("runs"))
    part = 0.71 if compiled else 0.57
    assert found.forward == pytest.approx(part * 8 * 20 * 32 * 32 / SECONDS / s.flop_per_token)
    assert found.step == pytest.approx(SECONDS * 500 / 80)
    assert found.note == "by the rate of a matrix product; measured on 80 features at an L0 of 0.5%"
    assert (found.is_gpu, found.element) == (False, 4)


def test_a_step_of_several_kinds_is_their_mean(fresh_folder, monkeypatch):
    config = load(TINY, [])
    s = sizes(config, find_architecture(config.model, offline=True))
    kinds = [SimpleNamespace(sae=SimpleNamespace(kind=kind)) for kind in ("a", "b", "a", "c")]
    train = SimpleNamespace(expanded=lambda: kinds)
    seconds = {"a": 1.0, "b": 2.0, "c": 6.0}
    monkeypatch.setattr(measure, "_step_of_kind", lambda single, *_: (seconds[single.sae.kind], 70))
    assert measure._step(train, s, CPU) == (3.0, 70)
    seconds["b"] = None  # for want of memory
    assert measure._step(train, s, CPU) == (None, 70)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), UserError("train.sae.k: too large")])
def test_a_step_that_does_not_fit_has_no_time(fresh_folder, monkeypatch, error):
    config = load(TINY, [])
    s = sizes(config, find_architecture(config.model, offline=True))

    def failing(*_):
        raise error

    monkeypatch.setattr(measure, "new_sae", failing)
    assert measure._step(config.train, s, CPU) == (None, s.d_sae)
    error = RuntimeError("shapes do not fit")  # a fault, not a want of memory
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure._step(config.train, s, CPU)


def test_weights_are_read_by_the_byte(fixed):
    assert measure.measure_weights(32, 3, torch.bfloat16, CPU) == 5 * 4 * 32 * 32 * 2 / SECONDS
    assert measure.measure_weights(64, 3, torch.float32, CPU) == 2 * 4 * 64 * 64 * 4 / SECONDS  # two at least


@pytest.mark.parametrize(
    ("seconds", "calls", "fastest"),
    [([0.2, 0.1, 0.05, 0.1, 0.1, 0.1, 0.01], 6, 0.05), ([0.9, 0.7, 0.1], 2, 0.7), ([1.5, 0.1], 1, 1.5)],
)
def test_the_fastest_of_a_few_calls(monkeypatch, seconds, calls, fastest):
    clock, made = [0.0], []

    def action() -> None:
        clock[0] += seconds[len(made)]
        made.append(1)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure._fastest(action, CPU) == pytest.approx(fastest)
    assert len(made) == calls


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        (None, None, 4_096_000),
        ("max", "5", 4_096_000),
        ("3000000", "1000000", 2_000_000),
        ("9000000", "1", 4_096_000),
        ("3000000", "3000001", 0),
    ],
)
def test_free_memory_is_the_hosts_or_what_the_group_may_take(tmp_path, monkeypatch, limit, used, free):
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable:    4000 kB\n"}
    if limit:
        files |= {"sys/fs/cgroup/memory.max": f"{limit}\n", "sys/fs/cgroup/memory.current": f"{used}\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(measure, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert measure._free_memory() == free
