import itertools
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, only, pipeline, unlisted
from made_rows import batches, measured

from evaluate.downstream import NAMES, downstream
from evaluate.fidelity import density_figures
from evaluate.figures import EVERY, KEPT, read_figures, text
from evaluate.groups import by_source
from evaluate.intervals import with_intervals
from harvest.config import ModelConfig
from harvest.files import UserError, read_json, write_sealed
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


def test_rows_without_an_error_are_rows():
    saved = SavedSae(Standard.initial(8, 20), HOOK, InputStatistics(1.0, 1.0, None), {})
    figures = measured(saved, batches(torch.zeros(6, 8).bfloat16(), np.arange(6) % 2), {}).figures
    assert figures[KEPT]["all"]["rows"] == 6 and figures[KEPT]["all"]["mse"] == 0


def test_figures_are_what_they_are_defined_as():
    """Rows of unlike sources whose means are far from zero, in batches of unlike length, one of them an outlier."""
    generator = torch.Generator().manual_seed(0)
    context = np.arange(300) % 6
    source_C = np.array([1, 0, 0, 1, 0, 0], np.uint8)
    source = source_C[context]
    rows = torch.randn(300, 8, generator=generator) + torch.from_numpy(source)[:, None] * 3 + 1
    rows[7] *= 100
    rows = rows.bfloat16()
    kept = np.arange(300) != 7
    saved = SavedSae(Standard.initial(8, 20, scale=0.7), HOOK, InputStatistics(0.7, 1.0, 50.0), {})
    saved.sae.b_dec.fill_(0.3)
    ends = (0, 120, 240, 300)
    found = measured(saved, batches(rows, context, kept, ends[1:3]), by_source(source_C, ["a", "b"]))

    x, W_dec = rows.double().numpy(), saved.sae.W_dec.double().numpy()
    f = np.maximum(x * 0.7 @ saved.sae.W_enc.double().numpy(), 0)
    x_hat = (f @ W_dec + 0.3) / 0.7
    error = np.square(x_hat - x).sum(1)
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    for counted, mask in ((KEPT, kept), (EVERY, np.ones(300, bool))):
        for group, chosen in (("all", mask), ("a", mask & (source == 0)), ("b", mask & (source == 1))):
            spread = np.square(x[chosen] - x[chosen].mean(0)).sum()
            batch = [np.arange(start, end)[chosen[start:end]] for start, end in itertools.pairwise(ends)]
            expected = {
                "rows": chosen.sum(),
                "l0": (f[chosen] > 0).sum(1).mean(),
                "explained_variance": 1 - error[chosen].sum() / spread,
                "explained_variance_legacy": np.concatenate(
                    [1 - error[i] / np.square(x[i] - x[i].mean(0)).sum(1) for i in batch]
                ).mean(),
                "mse": error[chosen].mean(),
                "cosine": ((x * x_hat).sum(1) / norm / norm_hat)[chosen].mean(),
                "norm_ratio": (norm_hat / norm)[chosen].mean(),
            }
            figures = found.figures[counted][group]
            assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
            numbers = np.unique(context[chosen])
            draws = np.random.default_rng(0).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), 1000)
            l0 = np.array([(f[chosen & (context == c)] > 0).sum() for c in numbers])
            counts = np.array([(chosen & (context == c)).sum() for c in numbers])
            assert figures["l0_interval"] == pytest.approx(np.quantile(draws @ l0 / (draws @ counts), (0.025, 0.975)))
    assert np.allclose(found.density_F, (f[kept] > 0).mean(0))
    assert np.allclose(found.max_F, f[kept].max(0), rtol=1e-5)
    assert np.allclose(found.by_group["b"][1], (f[kept & (source == 1)] > 0).mean(0))
    assert np.allclose(found.mean_D, x[kept].mean(0))


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
    figures, histogram = density_figures(np.array([0, 0, 0.5, 0.011, 0.1, 1.0]))
    assert figures == {"d_sae": 6, "dead_features": 2, "dead_fraction": 2 / 6, "dense_features": 2}
    assert (len(histogram["counts"]), histogram["edges"][0], histogram["edges"][-1]) == (56, -7, 0)
    # Eight bins a power of ten: 0.011 is just above 1e-2, 0.5 is 10^-0.3.
    assert {i: n for i, n in enumerate(histogram["counts"]) if n} == {40: 1, 48: 1, 53: 1, 55: 1}
    _, rare = density_figures(np.array([0, 1e-9, 0.5]))
    assert (sum(rare["counts"]), rare["counts"][0]) == (2, 1)


def test_cross_entropies_are_those_of_the_model_with_rows_exchanged(finished, monkeypatch):
    """Each variant by a plain hook on the whole model; the first position passes through."""
    monkeypatch.chdir(finished)
    model = load_model(
        ModelConfig(name="assets/tiny-llama"), None, [HOOK], torch.float32, torch.device("cpu"), with_head=True
    )
    tokens = np.random.default_rng(0).integers(0, 300, (6, 16)).astype(np.uint32)
    saved = SavedSae(Standard.initial(32, 24, scale=5.0), HOOK, InputStatistics(5.0, 1.0, None), {})
    mean_D = torch.linspace(-0.5, 1, 32, dtype=torch.float64)
    groups = by_source(np.array([0, 1, 1, 1, 1, 1], np.uint8), ["a", "b"])
    exclude = ExcludeConfig(positions=(0,), norm_above_median=None)
    found = downstream(model, saved, exclude, mean_D, tokens, groups, 4)
    ids = torch.from_numpy(tokens.astype(np.int64))
    passed = torch.arange(16)[:, None] == 0

    def rebuilt(x):
        f = torch.relu(x.bfloat16().float() * 5 @ saved.sae.W_enc + saved.sae.b_enc)
        return (f @ saved.sae.W_dec + saved.sae.b_dec) / 5

    def log_probabilities(change):
        handle = model.modules[HOOK].register_forward_hook(lambda _module, _inputs, output: change(output))
        with torch.no_grad():
            logits = model.model(ids).logits
        handle.remove()
        return logits.double().log_softmax(-1).numpy()

    variants = {
        "clean": lambda x: x,
        "sae": lambda x: torch.where(passed, x, rebuilt(x)),
        "mean_ablated": lambda x: torch.where(passed, x, mean_D.float()),
        "zero_ablated": lambda x: x * passed,
        "sae_all_rows": rebuilt,
        "zero_ablated_all_rows": torch.zeros_like,
    }
    log_p = {name: log_probabilities(change) for name, change in variants.items()}
    for group, chosen in (("all", slice(None)), ("a", slice(1)), ("b", slice(1, None))):
        next_p = {
            name: np.take_along_axis(p[chosen, :-1], tokens[chosen, 1:, None].astype(np.int64), 2)
            for name, p in log_p.items()
        }
        expected = {f"ce_{name}": -p.mean() for name, p in next_p.items()} | {"contexts": len(tokens[chosen])}
        for rows in ("", "_all_rows"):
            clean, zero, sae = (expected[f"ce_{n}"] for n in ("clean", f"zero_ablated{rows}", f"sae{rows}"))
            expected[f"ce_loss_score{rows}"] = (zero - sae) / (zero - clean)
            p, q = log_p["clean"][chosen], log_p[f"sae{rows}"][chosen]
            expected[f"kl_sae{rows}"] = (np.exp(p) * (p - q)).sum(-1).mean()
        assert expected.keys() == set(NAMES)
        assert {name: found[group][name] for name in NAMES} == pytest.approx(expected, rel=1e-3)
        assert len({round(value, 6) for value in expected.values()}) == len(expected)


def test_figures_are_named_defined_and_read_back(finished):
    evaluation = read_figures(only(finished, "runs/evaluate/*"))
    sae = evaluation.own(HOOK)
    assert sae and not evaluation.own("model.layers.9")
    groups = ["all", "chat", "reasoning"]
    assert list(sae.table("fidelity")) == [(rows, group) for rows in (KEPT, EVERY) for group in groups]
    assert list(sae.table("downstream")) == [("", group) for group in groups]
    assert list(sae.table("downstream")["", "all"]) == list(NAMES)
    for figure in sae.figures:
        assert figure.unit and figure.definition, figure
        if figure.interval and figure.name in ("l0", "mse", "explained_variance", "ce_clean"):
            assert figure.interval[0] < figure.value < figure.interval[1]
    assert (sae.figure("l0").rows, sae.figure("l0").unit) == (KEPT, "features")
    assert sae.value("rows", "fidelity", EVERY) == 512 == 2 * sae.value("rows", "fidelity", EVERY, "chat")
    assert sae.value("d_sae") == 128
    assert sae.value("nothing") is None


def test_figures_of_another_version_or_with_a_part_missing_are_named(finished, tmp_path):
    kept = read_json(only(finished, "runs/evaluate/*/metrics.json"))
    write_sealed(tmp_path / "metrics.json", kept | {"schema": 99})
    with pytest.raises(UserError, match=r"metrics.json: schema: 99: this code reads \d+; `make eval` makes it anew"):
        read_figures(tmp_path)
    for part in ("definitions", "saes"):
        write_sealed(tmp_path / "metrics.json", {name: value for name, value in kept.items() if name != part})
        with pytest.raises(UserError, match=rf"damaged: KeyError\('{part}'\); `make eval` makes it anew"):
            read_figures(tmp_path)


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
    assert html.count("<svg") == 7
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


def no_best(run: Path) -> None:
    folder = only(run, f"runs/train/*/{HOOK}")
    shutil.rmtree(folder / "best")
    unlisted(folder.parent)


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
        (no_best, "evaluate.sae=best", "best does not exist: no look at held-out rows after the warm-up; take last"),
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


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        *((None, "l0", "–"), (1234.0, "rows", "1,234"), (33.62, "l0", "33.6"), (999.9, "mse", "999.9")),
        *((1000.0, "mse", "1,000"), (1234.5, "l0", "1,234"), (0.73432, "explained_variance", "0.734")),
    ],
)
def test_figures_of_tables(value, name, expected):
    assert text(value, name) == expected
