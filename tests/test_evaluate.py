import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, only, pipeline, unlisted

from evaluate.charts import ticks
from evaluate.downstream import downstream
from evaluate.fidelity import HeldoutBatch, density_figures, fidelity
from evaluate.groups import by_source
from evaluate.intervals import with_intervals
from harvest.config import ModelConfig
from harvest.files import read_json, write_sealed
from harvest.language_model import load_model
from train.checkpoint import SavedSae, load_sae, save_sae
from train.config import ExcludeConfig
from train.exclusion import InputStatistics
from train.standard import Standard

HOOK = "model.layers.1"


def identity(d: int, norm_limit: float | None = None) -> SavedSae:
    """An SAE that rebuilds every row: a feature for each sign of each dimension."""
    eye = torch.eye(d)
    both = torch.cat([eye, -eye])
    weights = {"W_enc": both.t().contiguous(), "b_enc": torch.zeros(2 * d), "W_dec": both, "b_dec": torch.zeros(d)}
    sae = Standard(weights, 2.0)
    return SavedSae(sae, HOOK, InputStatistics(2.0, 1.0, norm_limit), {})


def test_figures_are_what_they_are_defined_as():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 8, generator=generator).bfloat16()
    rows[7] *= 100
    kept = np.arange(300) != 7
    context = np.arange(300) % 6
    context_source = np.array([1, 0, 0, 1, 0, 0], np.uint8)
    source = context_source[context]
    saved = SavedSae(Standard.initial(8, 20, scale=0.7), HOOK, InputStatistics(0.7, 1.0, 50.0), {})
    sliced = (slice(0, 120), slice(120, 240), slice(240, 300))
    batches = [HeldoutBatch(rows[s], kept[s], context[s]) for s in sliced]
    found = fidelity(saved, iter(batches), by_source(context_source, ["a", "b"]), torch.device("cpu"))

    x = rows.double()
    f = torch.relu(x * 0.7 @ saved.sae.W_enc.double())
    error = (f @ saved.sae.W_dec.double() / 0.7 - x).square().sum(1)
    for counted, mask in (("outliers_excluded", torch.from_numpy(kept)), ("all_rows", torch.ones(300, dtype=bool))):
        for group, chosen in (("all", mask), ("b", mask & torch.from_numpy(source == 1))):
            figures = found.figures[counted][group]
            spread = (x[chosen] - x[chosen].mean(0)).square().sum()
            assert figures["rows"] == chosen.sum()
            assert figures["explained_variance"] == pytest.approx(float(1 - error[chosen].sum() / spread), abs=1e-6)
            assert figures["mse"] == pytest.approx(float(error[chosen].mean()), rel=1e-6)
            assert figures["l0"] == pytest.approx(float((f[chosen] > 0).sum(1).double().mean()))
            legacy = []
            for s in sliced:
                batch, inside = x[s][chosen[s]], error[s][chosen[s]]
                legacy.append(1 - inside / (batch - batch.mean(0)).square().sum(1))
            assert figures["explained_variance_legacy"] == pytest.approx(float(torch.cat(legacy).mean()), abs=1e-6)
    density = (f[torch.from_numpy(kept)] > 0).double().mean(0).numpy()
    assert np.allclose(found.density_F, density)
    assert torch.allclose(found.mean_D, x[torch.from_numpy(kept)].mean(0))


def test_a_perfect_sae_loses_nothing(finished, monkeypatch):
    monkeypatch.chdir(finished)
    model = load_model(
        ModelConfig(name="assets/tiny-llama"), None, [HOOK], torch.float32, torch.device("cpu"), with_head=True
    )
    tokens = np.random.default_rng(0).integers(0, 300, (6, 16)).astype(np.uint32)
    groups = by_source(np.array([0, 1, 0, 1, 0, 1], np.uint8), ["a", "b"])
    saved = identity(32)
    found = downstream(model, saved, ExcludeConfig(), torch.zeros(32), tokens, groups, 4)
    # Rows go through bfloat16, as the store holds them.
    assert found["all"]["ce_loss_score"] == pytest.approx(1, abs=0.02)
    assert (
        found["all"]["ce_mean_ablated"] == found["all"]["ce_zero_ablated"] == found["all"]["ce_zero_ablated_all_rows"]
    )
    with torch.no_grad():
        logits = model.model(torch.from_numpy(tokens.astype(np.int64))).logits
    clean = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(tokens[:, 1:].astype(np.int64)).flatten()
    )
    assert found["all"]["ce_clean"] == pytest.approx(clean.item(), rel=1e-5)
    assert found["a"]["contexts"] == found["b"]["contexts"] == 3
    assert (found["a"]["ce_clean"] + found["b"]["ce_clean"]) / 2 == pytest.approx(found["all"]["ce_clean"])


def test_rows_that_training_leaves_out_pass_through(finished, monkeypatch):
    monkeypatch.chdir(finished)
    model = load_model(
        ModelConfig(name="assets/tiny-llama"), None, [HOOK], torch.float32, torch.device("cpu"), with_head=True
    )
    tokens = np.random.default_rng(0).integers(0, 300, (4, 16)).astype(np.uint32)
    sae = SavedSae(Standard.initial(32, 8), HOOK, InputStatistics(1.0, 1.0, None), {})
    every_row = [
        ExcludeConfig(positions=tuple(range(16)), norm_above_median=None),
        ExcludeConfig(token_ids=tuple(range(300)), norm_above_median=None),
    ]
    for exclude in every_row:
        found = downstream(model, sae, exclude, torch.zeros(32), tokens, {}, 4)["all"]
        assert found["ce_sae"] == pytest.approx(found["ce_clean"], rel=1e-6)
        assert found["kl_sae"] == pytest.approx(0, abs=1e-6)
        assert found["ce_zero_ablated"] == pytest.approx(found["ce_clean"], rel=1e-6)
        assert found["ce_sae_all_rows"] != pytest.approx(found["ce_clean"], rel=1e-6)
        assert found["kl_sae_all_rows"] > 0


def test_densities():
    figures = density_figures(np.array([0, 0, 0.5, 0.01, 1.0]))
    assert (figures["dead_features"], figures["dense_features"], figures["dead_fraction"]) == (2, 2, 0.4)
    histogram = figures["log10_density_histogram"]
    assert (len(histogram["counts"]), histogram["edges"][0], histogram["edges"][-1]) == (56, -7, 0)
    assert (sum(histogram["counts"]), histogram["counts"][0]) == (3, 0)
    rare = density_figures(np.array([0, 1e-9, 0.5]))["log10_density_histogram"]["counts"]
    assert (sum(rare), rare[0]) == (2, 1)


def test_metrics_are_named_and_defined(finished):
    metrics = json.loads(only(finished, "runs/evaluate/*/metrics.json").read_text())
    sae = metrics["saes"][HOOK]
    for counted in ("outliers_excluded", "all_rows"):
        assert set(sae["fidelity"][counted]) == {"all", "chat", "reasoning"}
        for figures in sae["fidelity"][counted].values():
            assert {n for n in figures if not n.endswith("_interval")} == metrics["definitions"]["fidelity"].keys()
            for name in ("l0", "mse", "explained_variance"):
                low, high = figures[f"{name}_interval"]
                assert low < figures[name] < high
    assert set(sae["downstream"]) == {"all", "chat", "reasoning"}
    figures = {n for n in sae["downstream"]["all"] if not n.endswith("_interval")}
    assert figures == metrics["definitions"]["downstream"].keys()
    low, high = sae["downstream"]["all"]["ce_clean_interval"]
    assert low < sae["downstream"]["all"]["ce_clean"] < high
    assert sae["features"]["d_sae"] == 128


def test_the_report_opens_offline_and_escapes(run_folder):
    shutil.rmtree(only(run_folder, "runs/evaluate/*"))
    train = only(run_folder, "runs/train/*")
    manifest = read_json(train / "manifest.json")
    manifest["settings"]["hostile"] = "<script>alert(1)</script>"
    write_sealed(train / "manifest.json", manifest)
    assert pipeline("evaluate").status == 0
    html = only(run_folder, "runs/evaluate/*/report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"(src|href)=\"?(https?:)?//", html)
    assert "default-src 'none'" in html
    assert html.count("<svg") == 6
    assert "68.5%" in html
    assert "86.0" in html


def empty_split(run: Path) -> None:
    for record in run.glob("runs/harvest/*/store/holdout/shards/*"):
        record.unlink()


def other_width(run: Path) -> None:
    folder = only(run, f"runs/train/*/{HOOK}")
    save_sae(folder, Standard.initial(16, 8), HOOK, load_sae(folder).statistics, {})
    unlisted(folder.parent)


def other_hook(run: Path) -> None:
    path = only(run, f"runs/train/*/{HOOK}/sae.json")
    write_sealed(path, read_json(path) | {"hook_name": "model.layers.0"})
    unlisted(path.parents[1])


def cut_weights(run: Path) -> None:
    path = only(run, f"runs/train/*/{HOOK}/sae_weights.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


class Code:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def pickled_code(run: Path) -> None:
    torch.save({"encoder.weight": Code()}, run / "sae.pt")


@pytest.mark.parametrize(
    ("damage", "setting", "says"),
    [
        (None, "evaluate.features.include=[128]", "evaluate.features.include: 128: the SAE has 128 features, 0 to 127"),
        (None, "evaluate.steering.feature_ids=[3,128]", "evaluate.steering.feature_ids: 128: the SAE has 128 features"),
        (None, "sample.holdout_tokens=0", "sample.holdout_tokens: 0: input should be greater than or equal to 1"),
        (None, "sample.holdout_tokens=255", "holdout_tokens is less than one shard"),
        (empty_split, "evaluate.batch_rows=64", "holdout"),
        (other_width, "evaluate.batch_rows=64", "an SAE of d_in 16; the store"),
        (other_hook, "evaluate.batch_rows=64", "an SAE of model.layers.0, in the place of that of model.layers.1"),
        (cut_weights, "evaluate.batch_rows=64", "sae_weights.safetensors"),
        (pickled_code, f"evaluate.also=[{{name: x, path: sae.pt, format: linear, hook: {HOOK}}}]", "it was not run"),
    ],
)
def test_bad_input_is_named_before_any_work_and_overwrites_nothing(run_folder, damage, setting, says):
    if damage:
        damage(run_folder)
    kept = {name: data for name, data in contents(run_folder).items() if Path(name).name != ".inputs.json"}
    ran = pipeline("evaluate", setting)
    assert ran.status in (1, 2), ran.out
    assert says in ran.out
    assert "rows/s" not in ran.out
    after = contents(run_folder)
    assert kept.items() <= after.items()
    assert {Path(name).name for name in after.keys() - kept} <= {".inputs.json", ".lock-evaluate", "begun.json"}
    assert not Path("was-run").exists()


def test_without_downstream_and_with_the_best_sae(run_folder):
    ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.sae=best")
    assert ran.status == 0, ran.out
    assert "ce_clean" not in ran.out


def test_intervals_are_of_contexts_not_of_rows():
    means = np.random.default_rng(1).normal(5, 2, 400)  # of contexts of 100 equal rows each
    sums = np.stack([np.full(400, 100.0), 100 * means], 1)

    def figures_of(weights):
        rows, total = (weights @ sums).T
        return {"mean": total / rows}

    found = with_intervals(figures_of, 400, ("mean",))
    error = means.std() / np.sqrt(400)
    assert found["mean"] == pytest.approx(means.mean())
    assert found["mean_interval"] == pytest.approx([means.mean() - 1.96 * error, means.mean() + 1.96 * error], abs=0.02)
    assert with_intervals(figures_of, 400, ("mean",)) == found
    assert "mean_interval" not in with_intervals(lambda w: {"mean": w[:, 0]}, 1, ("mean",))


def test_no_held_out_row_left_is_an_error(run_folder):
    path = only(run_folder, "runs/train/*/manifest.json")
    manifest = read_json(path)
    manifest["settings"]["exclude"]["positions"] = list(range(16))
    write_sealed(path, manifest)
    shutil.rmtree(run_folder / "runs" / "evaluate")
    ran = pipeline("evaluate")
    assert ran.status == 1
    assert "train.exclude: {" in ran.out
    assert "leaves none of the held-out rows" in ran.out


def test_ticks_are_round():
    assert ticks(0, 720) == [0, 200, 400, 600]
    assert ticks(0, 0) == [0]
    assert [round(t, 3) for t in ticks(0.1, 0.62)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize("hook", ["model.layers.0", "model.layers.0.mlp"])
def test_a_batch_of_one_text_says_nothing_of_other_texts(finished, monkeypatch, hook):
    """Zeros behind an MLP leave the text in the residual stream, though the first batch does not show it."""
    monkeypatch.chdir(finished)
    model = load_model(
        ModelConfig(name="assets/tiny-llama"), None, [hook], torch.float32, torch.device("cpu"), with_head=True
    )
    tokens = np.random.default_rng(0).integers(0, 300, (4, 16)).astype(np.uint32)
    tokens[1] = tokens[0]
    saved = identity(32)._replace(hook=hook)
    found = downstream(model, saved, ExcludeConfig(), torch.zeros(32), tokens, {}, 2)
    ids = torch.from_numpy(tokens.astype(np.int64))
    handle = model.modules[hook].register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    with torch.no_grad():
        logits = model.model(ids).logits
    handle.remove()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["all"]["ce_zero_ablated_all_rows"] == pytest.approx(expected.item(), rel=1e-5)
