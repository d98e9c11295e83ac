"""What the stages leave, against transformers and numpy written out: nothing here is computed by code of ours.

Two hooks, two learning rates, and a warm-up that outlasts the first looks at held-out rows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import TWO_HOOKS, only, pipeline
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

HOOKS = ("model.layers.1", "model.layers.0")
HELDOUT = ("loss", "l0", "explained_variance", "explained_variance_legacy")
ROWS = 1536  # of training: six shards of 256
STEPS, WARMUP, DECAY, LR, L1 = 12, 6, 3, 6e-2, 10.0
# Every batch is the whole store, so that its rows are known; every step is logged and leaves a checkpoint.
WHOLE = {
    "batch_size": ROWS,
    "pool_rows": ROWS,
    "window_shards": 6,
    "epochs": STEPS,
    "lr": LR,
    "sae.l1_coefficient": L1,
    "l1_warmup_fraction": WARMUP / STEPS,
    "lr_decay_fraction": DECAY / STEPS,
    "validate_every": 2,
    "validation_rows": 512,
    "compute_dtype": "float32",
    "runtime.log_every": 1,
    "runtime.checkpoint_every": 1,
    "runtime.keep_last": STEPS,
}


def group(folder: Path, pattern: str) -> zarr.Group:
    return zarr.open_group(only(folder, pattern), mode="r")


def rows(folder: Path, split: str, hook: str) -> np.ndarray:
    """Stored rows in float64 (rows, d_in), in stored order."""
    bits = np.asarray(group(folder, "runs/harvest/*/store")[f"{split}/{hook}/acts"])
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def log(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def weights(folder: Path) -> list[np.ndarray]:
    """W_enc, b_enc, W_dec, b_dec in float64."""
    tensors = load_file(only(folder, "*.safetensors"))
    return [tensors[name].astype(np.float64) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]


def figures(folder: Path, x: np.ndarray, l1_coefficient: float) -> dict[str, float]:
    """What the log says of an SAE and scaled rows."""
    W_enc, b_enc, W_dec, b_dec = weights(folder)
    f = np.maximum(x @ W_enc + b_enc, 0)
    error = ((f @ W_dec + b_dec - x) ** 2).sum(1)
    spread = ((x - x.mean(0)) ** 2).sum(1)
    mse, l1 = error.mean(), (f @ np.sqrt((W_dec**2).sum(1))).mean()
    return {
        "loss": mse + l1_coefficient * l1,
        "mse": mse,
        "l1": l1,
        "l0": (f > 0).sum(1).mean(),
        "explained_variance": 1 - error.sum() / spread.sum(),
        "explained_variance_legacy": (1 - error / spread).mean(),
        "dead_features": (f > 0).any(0).size - (f > 0).any(0).sum(),  # an epoch is a batch
    }


def gradient_norm(folder: Path, x: np.ndarray, l1_coefficient: float) -> float:
    """Of the loss, by autograd."""
    W_enc, b_enc, W_dec, b_dec = tensors = [torch.from_numpy(w).requires_grad_() for w in weights(folder)]
    rows = torch.from_numpy(x)
    f = (rows @ W_enc + b_enc).relu()
    loss = (f @ W_dec + b_dec - rows).square().sum(1) + l1_coefficient * f @ W_dec.norm(dim=1)
    loss.mean().backward()
    return float(sum(w.grad.square().sum() for w in tensors) ** 0.5)


def trained(harvested: Path, folder: Path, settings: dict) -> Path:
    """A folder with the SAEs of both hooks, trained on the rows of another."""
    (folder / "runs").mkdir()
    for name in ("assets", "runs/sample", "runs/harvest"):
        (folder / name).symlink_to(harvested / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran = pipeline("train", TWO_HOOKS, *(f"train.{name}={value}" for name, value in settings.items()))
    assert ran.status == 0, ran.out
    return folder


@pytest.fixture(scope="module")
def whole(two_hooks, tmp_path_factory) -> Path:
    return trained(two_hooks, tmp_path_factory.mktemp("whole"), WHOLE)


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_each_hook_has_the_rows_of_its_layer(two_hooks, split):
    """Row by row what transformers' own model computes for that token, up to bfloat16."""
    store = group(two_hooks, "runs/harvest/*/store")[split]
    tokens = np.asarray(group(two_hooks, "runs/sample/*/contexts")[f"{split}/tokens"]).astype(np.int64)
    context, position, token = (np.asarray(store[f"row/{name}"]) for name in ("context", "position", "token_id"))
    assert np.array_equal(token, tokens[context, position])
    assert len({*zip(context.tolist(), position.tolist(), strict=True)}) == tokens.size
    model = AutoModelForCausalLM.from_pretrained(two_hooks / "assets/tiny-llama", dtype=torch.float32)
    outputs = {}
    for hook in HOOKS:
        keep = lambda _module, _inputs, output, hook=hook: outputs.update({hook: output})  # noqa: E731
        model.get_submodule(hook).register_forward_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    expected = {hook: output.numpy()[context, position] for hook, output in outputs.items()}
    for hook, other in (HOOKS, HOOKS[::-1]):
        found = rows(two_hooks, split, hook)
        size = np.abs(found).max()
        assert np.abs(found - expected[hook]).max() < 0.03 * size
        assert np.abs(found - expected[other]).max() > 0.3 * size
        norms = np.asarray(store[f"{hook}/norm"])
        assert norms == pytest.approx(np.sqrt((found**2).sum(1)), rel=1e-6)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_scale_of_each_hook(two_hooks, hook):
    """√d_in over the mean norm of the first window's rows, without those above ten times the median."""
    norms = np.sqrt((rows(two_hooks, "train", hook)[:512] ** 2).sum(1))
    for path in two_hooks.glob(f"runs/train/*/{hook}/sae.json"):
        about = json.loads(path.read_text())
        assert about["hook_name"] == hook
        assert about["median_norm"] == pytest.approx(np.median(norms), rel=1e-6)
        assert about["norm_limit"] == pytest.approx(10 * np.median(norms), rel=1e-6)
        assert about["scale"] == pytest.approx(32**0.5 / norms[norms <= 10 * np.median(norms)].mean(), rel=1e-6)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_figure_of_the_training_log(whole, hook):
    """A line has the figures of the weights before its step, on the batch of the step, at its λ."""
    folder = only(whole, f"runs/train/*/{hook}")
    x = rows(whole, "train", hook) * json.loads((folder / "sae.json").read_text())["scale"]
    lines = log(folder, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for step, line in enumerate(lines):
        assert line["tokens"] == ROWS * (step + 1)
        assert line["lr"] == pytest.approx(LR * min(1, (STEPS - step) / DECAY))
        assert line["l1_coefficient"] == pytest.approx(L1 * min(1, step / WARMUP))
        if step:
            before = folder / f"checkpoints/{step:08}"
            expected = figures(before, x, line["l1_coefficient"])
            assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4), step
            assert line["grad_norm"] == pytest.approx(gradient_norm(before, x, line["l1_coefficient"]), rel=1e-4)
    assert lines[-1]["dead_features"] > 0


@pytest.mark.parametrize("hook", HOOKS)
def test_every_figure_of_heldout_rows(whole, hook):
    """At the full λ, even during the warm-up."""
    folder = only(whole, f"runs/train/*/{hook}")
    x = rows(whole, "holdout", hook) * json.loads((folder / "sae.json").read_text())["scale"]
    lines = log(folder, "validation")
    assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
    for line in lines:
        step = line["step"]
        found = figures(folder if step == STEPS else folder / f"checkpoints/{step:08}", x, L1)
        expected = {name: found[name] for name in HELDOUT}
        assert {name: line[name] for name in HELDOUT} == pytest.approx(expected, rel=1e-4), step


def test_no_sae_of_the_warm_up_is_the_best(two_hooks, tmp_path):
    """λ rises through all of this run, and with it the loss of held-out rows."""
    changed = {"epochs": 4, "l1_warmup_fraction": 1, "lr": 3e-2, "sae.l1_coefficient": 1}
    folder = trained(two_hooks, tmp_path, WHOLE | changed)
    for path in folder.glob("runs/train/*/model.layers.*"):
        losses = {line["step"]: line["loss"] for line in log(path, "validation")}
        assert losses[2] < losses[4]
        assert json.loads((path / "best/sae.json").read_text())["step"] == 4


def test_a_sweep_trains_each_sae_at_its_own_rate(two_hooks, finished):
    """Both hooks at both rates; where hook and rate are those of the finished run, its very bytes."""
    found = {}
    for manifest in two_hooks.glob("runs/train/*/manifest.json"):
        lr = json.loads(manifest.read_text())["settings"]["lr"]
        for hook in HOOKS:
            lines = log(manifest.parent / hook, "train")
            assert {line["lr"] for line in lines[:10]} == {lr}
            found[hook, lr] = (manifest.parent / hook / "sae_weights.safetensors").read_bytes()
    assert found.keys() == {(hook, lr) for hook in HOOKS for lr in (1e-3, 3e-3)}
    assert len({*found.values()}) == 4
    alone = only(finished, "runs/train/*/model.layers.1/sae_weights.safetensors").read_bytes()
    assert found["model.layers.1", 1e-3] == alone
