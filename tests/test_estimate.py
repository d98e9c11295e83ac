import re
from pathlib import Path

import pytest
from conftest import ROOT, only, pipeline

from benchmarks.gpu import harvest as harvest_check
from harvest.activation_store import ActivationStore
from pipeline import benchmark_cost, estimate
from pipeline.architecture import find_architecture
from pipeline.config import load
from pipeline.measure import Machine, measure_disk
from pipeline.memory import harvest_memory, pinned_pools, training_memory
from pipeline.sizes import sizes

R1 = ROOT / "configs" / "r1-llama-8b.yaml"
CPU = Machine("a CPU", False, 4, 10**10, 1e8, 1e8, 3.0, 60.0, "measured")
GPU = Machine("a GPU", True, 2, 80 * 10**9, 1e12, 1e12, 50_000.0, 0.016, "measured")


def lines(machine: Machine, *overrides: str, free: int = 10**13) -> str:
    config = load(R1, list(overrides))
    shape = find_architecture(config.model, offline=True)
    return "\n".join(estimate.plan(config, shape, sizes(config, shape), machine, free, Path("runs")))


def test_sizes_of_the_papers_run():
    """The figures of docs/scaling.md."""
    config = load(R1, [])
    s = sizes(config, find_architecture(config.model, offline=True))
    assert s.layers == 20
    assert s.parameters == 20 * 218_112_000 + 128_256 * 4096
    assert s.flop_per_token == pytest.approx(20 * 2 * 218_103_808 + 20 * 2 * 1024 * 4096)
    assert s.context == 4 * 1024 * (6 * 4096 + 3 * 14_336)  # the gate, up and down projections are the widest
    assert (s.geometry.train_shards, s.geometry.holdout_shards, s.steps) == (15_258, 16, 200_000)
    assert s.store / 1e12 == pytest.approx(8.21, abs=0.01)
    assert s.contexts == 8 * (15_258 + 16) * 65_536
    assert s.sae == 4 * (2 * 4096 * 65_536 + 4096 + 65_536)
    assert s.checkpoint == 3 * s.sae + 8 * 65_536
    assert s.trained(3) == 3 * ((config.train.runtime.keep_last + 1) * s.checkpoint + 2 * s.sae)


def test_where_a_gpu_is_no_other_is_spoken_of():
    text = lines(GPU)
    assert "H100" not in text
    assert "warning" not in text
    last = "in short, on this machine: it fits; harvest 5h33m, training 53m20s; 8.3 TB of disk"
    assert text.splitlines()[-1] == last
    full, stream, again = (next(line for line in text.splitlines() if line.startswith(f"  {n}")) for n in WAYS)
    # 999,948,288 tokens at 50,000/s and 200,000 steps of 16 ms; five SAEs take five times the steps.
    assert full.split()[2:6] == ["8.2", "TB", "6h27m", "10h00m"]
    # 819.2M tokens are enough for training as it goes.
    assert stream.split()[1:5] == ["178", "GB", "5h26m", "9h00m"]
    assert "5h26m    27h12m" in again


WAYS = ("full store", "stream", "regenerate")


def test_what_does_not_fit_is_said_and_nothing_is_refused():
    text = lines(CPU, free=10**12)
    assert "warning: the disk of runs lacks 7.3 TB; harvest will refuse to start" in text
    assert "warning: harvest.batch_contexts=16 does not fit into 10 GB" in text
    assert "warning: training does not fit into 10 GB" in text
    assert "training reads   2.4 GB/s; the disk here: 100 MB/s" in text  # of the H100
    assert "one H100 (as measured on the 8B shape, not here)" in text
    assert "forward 63,639 tokens/s, a training step 14.2 ms; in proportion" in text
    assert "forward 51,090 tokens/s" in lines(CPU, "harvest.compile=false")
    assert "in all             8.3 TB; free in runs: 1 TB" in text
    last = text.splitlines()[-1]
    assert last.startswith("in short, on this machine: the disk of runs lacks 7.3 TB; harvest.batch_contexts=16 does")
    assert last.endswith("training does not fit into 10 GB; harvest 3,862 days, training 154 days; 8.3 TB of disk")


def test_the_activity_of_all_features_is_bounded_and_that_is_said():
    """An excerpt of 64 tokens: its place, a bit and a float a token."""
    each, fixed = 65_536 * (8 + 8 + 4 * 64), 65_536 * (2 * 20 + 796) + 16 * 64 * (5 * 1024 + 8) + 2 * 8 + 16
    fit = (2**29 - fixed) // each
    text = next(line for line in lines(GPU).splitlines() if line.startswith("  activity"))
    assert fit == 26
    assert f"{(fixed + fit * each) / 1e6:.0f} MB at most" in text
    assert f"9 strongest and 17 drawn excerpts of each feature; {SETTING}={fixed + 100 * each} keeps 36 and 64" in text
    whole = lines(GPU, f"{SETTING}={fixed + 100 * each}")
    assert "1.8 GB at most for each SAE, on the disk and in memory: 36 strongest and 64 drawn" in whole
    assert "keeps" not in whole
    assert "  activity" not in lines(GPU, "evaluate.features=null")


SETTING = "evaluate.features.activity_bytes"


def test_memory_of_the_papers_run_by_arithmetic():
    def memory(*overrides: str, machine: Machine = GPU) -> int:
        config = load(R1, list(overrides))
        return training_memory(config.train, sizes(config, find_architecture(config.model, offline=True)), machine)

    B, D, F = 4096, 4096, 65_536
    weights, looks = 2 * D * F + D + F, 16_384 * D * 2
    kept = 14 * weights + 4 * weights + looks  # weights, two moments, copies in bfloat16; gradients; rows
    look = 6 * B * F + 12 * B * D  # a dense look: features in float32 and bfloat16; three float32 tensors of rows
    assert memory() == kept + look
    # Half of all entries are active at first: 28 bytes each beside the gradients, and the rows in five forms.
    assert memory("train.kernel=sparse") == kept + 28 * B * F // 2 + 14 * B * D
    sorted_first = memory("train.kernel=sparse", "train.batch_size=8192") - 14 * weights - looks
    assert sorted_first == 44 * 8192 * F // 2  # more than the gradients and 28 bytes
    # Three SAEs share a step's gradients; and float32 products take no copies.
    assert memory("train.sweep.l1_coefficient=[3,5,8]") == memory() + 2 * 14 * weights
    plain = 12 * weights + 4 * weights + looks
    assert memory("train.compute_dtype=float32") == plain + 8 * B * F + 12 * B * D
    # A TopK of 64 in a row is sparse at once, with few entries.
    topk = ("train.sae.kind=topk", "train.sae.k=64", "train.sae.l1_coefficient=null", "train.sae.aux_coefficient=0.1")
    assert memory(*topk) == kept + 2 * B * F + 16 * B * D  # a look's pre-activations take more than that
    assert memory(*topk, "train.kernel=dense") == kept + 13 * B * F
    # With many there are twice as many candidates, and sorting them takes more than a look.
    many = memory(*topk, "train.sae.k=20000"), memory(*topk, "train.sae.k=20010")
    assert many[1] - many[0] == 44 * 2 * 10 * B


def test_the_harvests_memory_is_near_what_was_measured():
    """benchmarks/gpu/harvest.py on an NVIDIA H200, which has two such models on the device."""
    config = load(R1, [])
    s = sizes(config, find_architecture(config.model, offline=True))
    memory = harvest_memory(s, GPU)
    assert memory.fixed == 2 * s.parameters + 2 * 65_536 * (2 * 4096 + 4)
    assert harvest_check.estimated() == 2 * s.parameters + memory.fixed + 16 * memory.context
    assert 22_740_625_920 / harvest_check.estimated() == pytest.approx(1, abs=0.05)
    two = config.model_copy(
        update={"harvest": config.harvest.model_copy(update={"hooks": ("model.layers.3", "model.layers.19")})}
    )
    more = harvest_memory(sizes(two, find_architecture(config.model, offline=True)), GPU)
    assert more.fixed - memory.fixed == 2 * 65_536 * (2 * 4096 + 4)
    assert memory.largest(64, memory.fixed + 33 * memory.context) == 32
    assert memory.largest(64, memory.fixed) == 0


def test_a_step_of_nested_prefixes_keeps_rows_of_each():
    def memory(*overrides: str) -> int:
        settings = ("train.sae.k=64", "train.sae.l1_coefficient=null", "train.kernel=sparse", *overrides)
        config = load(R1, list(settings))
        return training_memory(config.train, sizes(config, find_architecture(config.model, offline=True)), GPU)

    rows = 4 * 4096 * 4096  # of a batch, in float32
    plain, aux = "train.sae.kind=batchtopk", "train.sae.aux_coefficient=0.1"
    nested = ("train.sae.kind=matryoshka", "train.sae.prefixes=[1024,4096,16384,65536]")
    active, other, look = 28 * 2 * 64 * 4096, 14 * 4096 * 4096, 16 * 4096 * 4096 + 2 * 4096 * 65_536
    # Of few prefixes, a look at held-out rows takes more than a step.
    assert other + max(active, 5 * rows) < look < other + 16 * rows
    assert memory(*nested, aux) - memory(plain, aux) == other + 16 * rows - look
    # Nor does that of few features, unless dead ones are revived, for which there are three more of the two.
    narrow = (plain, "train.sae.d_sae=16384")
    look = 16 * 4096 * 4096 + 2 * 4096 * 16_384
    assert other + 2 * rows < look < other + 5 * rows
    assert memory(*narrow, aux) - memory(*narrow, "train.sae.aux_coefficient=0") == other + 5 * rows - look


def test_what_nearly_fits_does_not():
    """A tenth is left for fragments and the libraries."""
    config = load(R1, [])
    s = sizes(config, find_architecture(config.model, offline=True))
    training, harvest = training_memory(config.train, s, GPU), harvest_memory(s, GPU)
    for free, says in ((training / 0.95, True), (training / 0.85, False)):
        assert ("warning: training does not fit into" in lines(GPU._replace(memory=int(free)))) == says
    for free, says, largest in ((harvest.of(16) / 0.95, True, 8), (harvest.of(16) / 0.85, False, 16)):
        text = lines(GPU._replace(memory=int(free)))
        assert ("warning: harvest.batch_contexts=16 does not fit into" in text) == says
        assert f"batch_contexts   16 set; the largest that fits: {largest}\n" in text


def test_hours_are_of_what_is_slowest():
    """Two hooks, and a checkpoint at each fourth of the steps."""
    cadence = ["train.runtime.checkpoint_every=50_000", "train.runtime.checkpoint_minutes=null"]
    config = load(R1, ["harvest.hooks=[model.layers.3,model.layers.19]", *cadence])
    s = sizes(config, find_architecture(config.model, offline=True))
    machine = GPU._replace(read=1e9, write=2e9)
    batch, row = 4096 * 2 * 4096 / 1e9, s.shard / 65_536  # seconds to read one, bytes of both hooks
    assert 0.016 < batch < 5 * 0.016
    for saes, step in ((1, batch), (5, 5 * 0.016)):
        expected = 2 * (200_000 * step + 4 * saes * s.checkpoint / 2e9)
        assert estimate.train_seconds(config, s, machine, saes) == pytest.approx(expected)
        for every, written in ((None, int(200_000 * step / 600)), (1000, 200), (50_000, int(200_000 * step / 600))):
            runtime = config.train.runtime.model_copy(update={"checkpoint_every": every, "checkpoint_minutes": 10})
            timed = config.model_copy(update={"train": config.train.model_copy(update={"runtime": runtime})})
            expected = 2 * (200_000 * step + written * saes * s.checkpoint / 2e9)
            assert estimate.train_seconds(timed, s, machine, saes) == pytest.approx(expected)
    unknown = machine._replace(read=None, write=None)
    assert estimate.train_seconds(config, s, unknown, 1) == pytest.approx(2 * 200_000 * 0.016)
    assert estimate.train_seconds(config, s, machine._replace(step=None), 1) is None
    assert row / 2e9 < 1 / 50_000 < row / 5e8
    assert estimate.harvest_seconds(s, machine, 1_000_000) == pytest.approx(20)
    assert estimate.harvest_seconds(s, machine._replace(write=5e8), 1_000_000) == pytest.approx(row / 500)
    assert estimate.harvest_seconds(s, unknown, 1_000_000) == pytest.approx(20)
    assert estimate.harvest_seconds(s, machine._replace(forward=None), 1) is None


def test_a_sweep_reads_as_fast_as_its_step_is_slow():
    text = lines(GPU, "train.sweep.l1_coefficient=[3,5,8]")
    assert "harvest writes   410 MB/s; the disk here: 1 TB/s" in text  # 50,000 rows of 8,196 bytes
    assert "training reads   699 MB/s; the disk here: 1 TB/s" in text  # a batch of 33.6 MB in 48 ms
    assert "forward 50,000 tokens/s, a training step 16 ms; measured" in text
    assert "200,000 steps of 4,096 rows = 0.82 epochs; 1 hook(s) x 3 SAE(s) of up to 65,536 features: " in text


@pytest.mark.parametrize(
    ("step", "says"), [(0.0142, "14.2"), (0.0999, "99.9"), (0.5, "500"), (0.9997, "1,000"), (12.3456, "12,346")]
)
def test_rates_have_three_digits_or_all(step, says):
    assert f"a training step {says} ms; measured" in lines(GPU._replace(step=step))


def test_pinned_pools_are_three_and_rounded_up():
    config = load(R1, ["train.pool_rows=100_000"])
    s = sizes(config, find_architecture(config.model, offline=True))
    assert pinned_pools(config.train, s, CPU) == 2 * 100_000 * 8192
    assert pinned_pools(config.train, s, GPU) == 3 * 2**30


def test_a_bounded_disk_needs_room_for_its_part_alone():
    text = lines(GPU, "harvest.runtime.disk_limit=300GB", free=10**12)
    assert "warning: the disk of runs has room for `make stream` alone" in text
    assert text.splitlines()[-1].startswith("in short, on this machine: it fits; ")
    assert "the disk of runs lacks 86 GB" in lines(GPU, "harvest.runtime.disk_limit=300GB", free=10**11)


def test_a_store_in_a_bucket_takes_no_disk():
    text = lines(CPU, "harvest.runtime.store=s3://bucket/prefix", free=10**12)
    assert "the store, which lies in s3://bucket/prefix" in text
    assert "warning: the disk" not in text


def test_every_epoch_of_a_stream_pays_the_forward_passes():
    def stream(*settings: str) -> str:
        return next(line for line in lines(GPU, *settings).splitlines() if line.startswith("  stream"))

    assert "two windows; every epoch pays the forward passes" in stream()
    assert stream() != stream("train.training_tokens=3_000_000_000")


def test_it_measures_this_machine_and_leaves_nothing(finished, fresh_folder, monkeypatch):
    monkeypatch.setattr("pipeline.measure.DISK_BYTES", 1 << 20)
    ran = pipeline("estimate")
    assert ran.status == 0, ran.out
    assert "by the rate of a matrix product; measured on 128 features at an L0 of 0.5%" in ran.out
    assert "H100" not in ran.out  # nothing is known of one with so narrow a model
    assert not list(Path("runs").iterdir())
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    config = load(ROOT / "configs" / "tiny.yaml", [])
    s = sizes(config, find_architecture(config.model, offline=True))
    assert s.geometry == store.geometry
    checkpoint = next(finished.glob("runs/train/*/model.layers.1/checkpoints/*/tensors.safetensors"))
    assert s.checkpoint == pytest.approx(checkpoint.stat().st_size, rel=0.05)


def test_a_benchmark_has_a_section(fresh_folder, monkeypatch):
    Path("runs").mkdir()
    monkeypatch.setattr(estimate, "measure", lambda *_: CPU)
    monkeypatch.setattr(benchmark_cost, "measure_weights", lambda *_: 1e10)
    assert "benchmark" not in pipeline("estimate").out
    out = pipeline("estimate", "benchmark.task=arithmetic", "benchmark.problems=3", "benchmark.samples=2").out
    assert re.search(r"\nbenchmark\n +answers +arithmetic: 3 problems x 2 samples x \d+ conditions = ", out), out


def test_the_disk_is_measured_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.measure.DISK_BYTES", 1 << 20)
    assert all(rate > 0 for rate in measure_disk(tmp_path / "runs"))
    assert not list((tmp_path / "runs").iterdir())


def test_a_benchmark_is_counted_and_timed_by_what_a_step_reads(monkeypatch):
    monkeypatch.setattr(benchmark_cost, "measure_weights", lambda *_: 1e10)
    given = ["benchmark.max_new_tokens=4000", "benchmark.slots=16", "benchmark.compute_dtype=float32"]
    config = load(R1, given)
    shape = find_architecture(config.model, offline=True)
    rows = dict(benchmark_cost.benchmark_lines(config.benchmark, shape, CPU))
    # None, and of two features two strengths each, with a control.
    assert (
        "math-500: 500 problems x 2 samples x 9 conditions = 9,000, of 4,000 tokens at most: 36,000,000"
        in rows["answers"]
    )
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
    weights, cache = 32 * layer + 128_256 * 4096 + 4096, 2 * 32 * 8 * 128
    step = (weights + 16 * 2150 * cache) * 4 / 1e10
    assert benchmark_cost.step_of(shape)[:2] == (weights, cache)
    assert f"{36e6 / 16 * step / 86400:,.0f} days at most, with {16 / step:,.0f} tokens/s" in rows[CPU.name]
    assert f"{(weights + 16 * 4150 * cache) * 4 / 1e9:.0f} GB of 10 GB: lower benchmark.slots" in rows[CPU.name]
    half = config.benchmark.model_copy(update={"compute_dtype": "bfloat16"})
    assert f"with {32 / step:,.0f} tokens/s" in dict(benchmark_cost.benchmark_lines(half, shape, CPU))[CPU.name]
    other = next(text for name, text in rows.items() if "H100" in name)
    assert other.startswith("40h00m at most, with 250 tokens/s")  # 36M tokens, 16 at a time, 32 layers of 2 ms
    assert other.endswith("24 GB of 80 GB")
    assert not [name for name in dict(benchmark_cost.benchmark_lines(config.benchmark, shape, GPU)) if "H100" in name]
    # Of many slots, the keys and values take longer to read than the kernels to launch.
    many = load(R1, [*given, "benchmark.slots=512"]).benchmark
    step = (weights + 512 * 2150 * cache) * 2 / (0.6 * 3.35e12)
    assert step > 32 * 2e-3
    rows = dict(benchmark_cost.benchmark_lines(many, shape, CPU))
    other = next(text for name, text in rows.items() if "H100" in name)
    assert f" at most, with {512 / step:,.0f} tokens/s; weights, keys and values of 512 answers take " in other
    room = f"{(weights + 512 * 4150 * cache) * 2 / 1e9:.0f} GB of 80 GB"
    assert other.endswith(f"{room}: lower benchmark.slots or benchmark.max_new_tokens")


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (["benchmark.task=gsm8k"], 1319),
        (["benchmark.task=aime-2024", "benchmark.problems=40"], 30),
        (["benchmark.problems=40"], 40),
        (["benchmark.task=arithmetic"], 162),
        (["benchmark.task=arithmetic", "benchmark.problems=40"], 40),
        (["benchmark.source.path=other/set"], None),
        (["benchmark.source.path=other/set", "benchmark.problems=7"], 7),
    ],
)
def test_problems_of_the_hub_are_known_by_number(given, count):
    assert benchmark_cost.count_problems(load(R1, given).benchmark) == count


def test_problems_of_an_unknown_number_are_not_timed():
    config = load(R1, ["benchmark.source.path=other/set"]).benchmark
    shape = find_architecture(load(R1, []).model, offline=True)
    said = "other/set: how many problems it has is not known here; benchmark.problems says how many"
    assert list(benchmark_cost.benchmark_lines(config, shape, CPU)) == [("answers", said)]
