import shutil
import time

import numpy as np
import pytest
import torch
import zarr
from conftest import contents, only, pipeline, start

from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.device import resolve_device, resolve_dtype
from harvest.language_model import HookedModel, load_model
from harvest.shard_buffer import ShardBuffer


def test_rows_are_the_models_activations(run_folder):
    """Every stored row is the bfloat16 activation of its token in its context."""
    store = ActivationStore.open(only(run_folder, "runs/harvest/*/store"))
    tokens = zarr.open_group(only(run_folder, "runs/sample/*/contexts"), mode="r")["train/tokens"][:]
    hook = "model.layers.1"
    device = resolve_device("cpu")
    model = load_model(ModelConfig(name="assets/tiny-llama"), None, [hook], resolve_dtype("auto", device), device)
    chunks = [store.read_chunk("train", hook, c) for c in range(4, 8)]
    rows = torch.from_numpy(np.concatenate(chunks)).view(torch.bfloat16)
    context, position = (store.read_provenance("train", name, 1).astype(int) for name in ("context", "position"))
    assert sorted(set(context.tolist())) == list(range(16, 32))
    assert len({*zip(context.tolist(), position.tolist(), strict=True)}) == 256
    assert np.array_equal(store.read_provenance("train", "token_id", 1), tokens[context, position])
    batches = [model.activations(torch.from_numpy(tokens[i : i + 4].astype(np.int64)))[hook] for i in range(16, 32, 4)]
    expected = torch.cat(batches)[context - 16, position].bfloat16()
    assert torch.equal(rows, expected)
    assert np.array_equal(store.read_norms("train", hook, 1), expected.float().norm(dim=1).numpy())


def test_killed_and_started_again_gives_the_same_store(finished, fresh_folder):
    assert pipeline("sample").status == 0
    process = start("harvest", cwd=fresh_folder)
    deadline = time.monotonic() + 300
    while not list(fresh_folder.glob("runs/harvest/*/store/*/shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    store = only(fresh_folder, "runs/harvest/*/store")
    assert not (store.parent / "manifest.json").exists()
    ran = pipeline("harvest")
    assert ran.status == 0, ran.out
    assert "resumes" in ran.out
    assert contents(store) == contents(only(finished, "runs/harvest/*/store"))


def test_an_interrupt_keeps_complete_shards(fresh_folder, finished, monkeypatch):
    assert pipeline("sample").status == 0
    made = []
    original = ShardBuffer.start

    def fourth_is_interrupted(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(ShardBuffer, "start", fourth_is_interrupted)
    ran = pipeline("harvest")
    assert ran.status == 130
    assert "run the same command again" in ran.out
    store = ActivationStore.open(only(fresh_folder, "runs/harvest/*/store"))
    assert sum(len(store.complete_shards(split)) for split in ("train", "holdout")) == 3
    assert "would resume" in pipeline("status").out
    monkeypatch.setattr(ShardBuffer, "start", original)
    assert pipeline("harvest").status == 0
    assert contents(store.path) == contents(only(finished, "runs/harvest/*/store"))


def test_a_nan_stops_the_run_and_names_context_and_hook(fresh_folder, monkeypatch):
    assert pipeline("sample").status == 0
    original = HookedModel.activations
    calls = []

    def poisoned(self, tokens):
        out = original(self, tokens)
        calls.append(1)
        if len(calls) == 6 and tokens.shape[0] > 1:  # after the width check and a shard of 4
            out["model.layers.1"] = out["model.layers.1"].clone()
            out["model.layers.1"][2, 3, 4] = float("nan")
        return out

    monkeypatch.setattr(HookedModel, "activations", poisoned)
    ran = pipeline("harvest")
    assert ran.status == 1
    assert "'model.layers.1': NaN or infinity in the activations of holdout context 18" in ran.out
    store = ActivationStore.open(only(fresh_folder, "runs/harvest/*/store"))
    assert store.complete_shards("holdout") == {0}


def test_out_of_memory_names_the_setting(fresh_folder, monkeypatch):
    assert pipeline("sample").status == 0
    original = HookedModel.activations

    def too_large(self, tokens):
        if tokens.numel() > 6:  # more than the look at the width
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens)

    monkeypatch.setattr(HookedModel, "activations", too_large)
    ran = pipeline("harvest")
    assert ran.status == 1
    assert "harvest.batch_contexts: 4: out of memory" in ran.out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("harvest.hooks=[model.layers.9]", "the model has 2 layers, 0 to 1"),
        ("harvest.hooks=[model.layers.0.mlp.gate_proj,model.layers.0]", "hooks of different widths"),
        ("harvest.hooks=[model.rotary_emb]", "not a row for each; hook a layer"),
        ("model.name=assets/none", "model.name: 'assets/none': no such folder"),
    ],
)
def test_what_the_model_cannot_give(fresh_folder, override, message):
    assert fresh_folder.exists()
    assert pipeline("sample").status == 0
    ran = pipeline("harvest", override)
    assert ran.status == 1
    assert message in ran.out


def test_widths_that_only_the_model_itself_shows(run_folder, monkeypatch):
    """Where fake tensors cannot be run through it, the settings' check knows of no width."""
    monkeypatch.setattr("pipeline.settings_check._shapes", lambda *_given: None)
    ran = pipeline("harvest", "harvest.hooks=[model.layers.0.mlp.gate_proj,model.layers.0]")
    assert ran.status == 1
    assert (
        "harvest.hooks: hooks of different widths (model.layers.0.mlp.gate_proj: 64, model.layers.0: 32); harvest them "
        "with settings of their own" in " ".join(ran.out.split())
    )


def test_no_compiled_layers_where_products_are_widened(run_folder, monkeypatch):
    monkeypatch.setattr("harvest.products.has_bfloat16", lambda _device: False)
    ran = pipeline("harvest", "harvest.compile=true", "harvest.compute_dtype=bfloat16")
    assert ran.status == 1
    assert "harvest.compile: true: not with harvest.compute_dtype=bfloat16 on a CPU without" in ran.out
    assert "set it to false, or compute_dtype to auto" in ran.out


def test_a_gpu_that_is_not_there(run_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = pipeline("harvest", "harvest.runtime.device=cuda", "--force", "--yes")
    assert ran.status == 1
    assert "runtime.device: 'cuda': torch sees no GPU; set it to auto or cpu" in ran.out
    assert pipeline("verify").status == 0  # what was there is there


def test_more_positions_than_the_model_has(fresh_folder):
    changed = (
        "sample.context_size=256",
        "sample.shard_contexts=4",
        "harvest.chunk_rows=64",
        "sample.train_tokens=2048",
    )
    changed += ("sample.holdout_tokens=1024",)
    ran = pipeline("sample", *changed)
    assert ran.status == 1
    assert not list(fresh_folder.glob("runs/sample/*/contexts"))
    assert "sample.context_size: 256: the model has 128 positions" in ran.out


@pytest.mark.parametrize("damage", ["missing", "flipped", "gone"])
def test_damaged_contexts_are_never_harvested(fresh_folder, damage):
    """A missing chunk would read as token 0."""
    assert pipeline("sample").status == 0
    file = only(fresh_folder, "runs/sample/*/contexts/train/tokens/c/1/0")
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[50] ^= 1
        file.write_bytes(data)
    else:
        shutil.rmtree(file.parents[4])
    ran = pipeline("harvest")
    assert ran.status == 1
    assert "`python -m pipeline sample --force` makes them anew" in ran.out
    assert pipeline("sample", "--force", "--yes").status == 0
    assert pipeline("harvest").status == 0


def test_compiled_layers_are_another_harvest_of_nearly_the_same_rows(finished, run_folder, monkeypatch):
    real, graphs = torch.compile, []

    def compile_layer(forward, dynamic, options):
        return real(forward, dynamic=dynamic, backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)

    monkeypatch.setattr("torch.compile", compile_layer)
    ran = pipeline("harvest", "harvest.compile=true")
    assert ran.status == 0, ran.out
    assert graphs
    assert "compiling the decoder layers" in ran.out
    eager, compiled = sorted(run_folder.glob("runs/harvest/*/store"), key=lambda path: path.parent.stat().st_ctime)
    rows = [ActivationStore.open(path).read_chunk("train", "model.layers.1", 0) for path in (eager, compiled)]
    a, b = (torch.from_numpy(chunk).view(torch.bfloat16).float() for chunk in rows)
    assert (a - b).norm() <= 1e-2 * a.norm()
