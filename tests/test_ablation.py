"""What a model loses without a feature: every figure against one context at a time, written out."""

import json

import numpy as np
import pytest
import torch
from conftest import only, pipeline
from test_operations import HOOK, saved
from test_steering import TINY

from evaluate.ablation import ablate, changes
from evaluate.figures import read_figures
from harvest.language_model import HookedModel, load_model
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import Exclusion

FEATURES = (3, 40, 7)  # 7 never fires, 40 in few contexts


@pytest.fixture
def model(finished, monkeypatch) -> HookedModel:
    monkeypatch.chdir(finished)
    hooks = ["model.layers.0", "model.layers.1"]
    return load_model(TINY, None, hooks, torch.float32, torch.device("cpu"), with_head=True)


def sae_and_rule(model: HookedModel, tokens: np.ndarray, hook: str) -> tuple[SavedSae, Exclusion]:
    """Features that fire at half and at a thirtieth of the rows, and never; a tenth of the rows is left out."""
    of = saved("standard")._replace(hook=hook)
    x = model.activations(torch.from_numpy(tokens.astype(np.int64)))[hook].flatten(0, 1)
    for feature, quantile in ((3, 0.5), (40, 0.97)):
        z_N = x @ of.sae.W_enc[:, feature] * of.sae.scale
        of.sae.b_enc[feature] = -z_N.quantile(quantile)
        of.sae.W_dec[feature] *= 20
    of.sae.b_enc[7] = -1e6
    return of, Exclusion(ExcludeConfig(positions=(0,), token_ids=(17,)), float(x.norm(dim=1).quantile(0.9)))


def losses_by_hand(model: HookedModel, ids: list[int], hook: str, row: torch.Tensor | None) -> np.ndarray:
    """-log p of each next token of one context, with a module's output replaced."""
    module = model.modules[hook]
    handle = module.register_forward_hook(lambda _module, _inputs, output: output if row is None else row[None])
    with torch.no_grad():
        logits = model.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    handle.remove()
    return np.array([-logits[t].log_softmax(-1)[ids[t + 1]].item() for t in range(len(ids) - 1)])


@pytest.mark.parametrize("hook", ["model.layers.0", "model.layers.1"])
def test_changes_equal_one_context_at_a_time(model, hook):
    tokens = np.random.default_rng(0).integers(0, 300, (7, 12)).astype(np.uint32)
    of, rule = sae_and_rule(model, tokens, hook)
    found = ablate(model, of, rule, tokens, FEATURES, 3)
    clean, change, at_active, active = [], np.zeros((3, 7)), np.zeros((3, 7)), np.zeros((3, 7))
    for c, ids in enumerate(tokens.tolist()):
        clean.append(losses_by_hand(model, ids, hook, None))
        x_SD = model.activations(torch.tensor([ids]))[hook][0]
        f = of.sae.encode(x_SD)
        kept = torch.tensor(
            [p > 0 and t != 17 and x.norm() <= rule.norm_limit for p, (t, x) in enumerate(zip(ids, x_SD, strict=True))]
        )
        for k, feature in enumerate(FEATURES):
            without = f.clone()
            without[kept, feature] = 0
            row = of.sae.decode(without) + (x_SD - of.sae.decode(f))
            added = losses_by_hand(model, ids, hook, row) - clean[-1]
            fires = ((f[:, feature] > 0) & kept)[:-1].numpy()
            change[k, c], at_active[k, c], active[k, c] = added.mean(), added[fires].sum(), fires.sum()
    assert np.array_equal(found.active_KC, active)
    assert found.clean_C == pytest.approx(np.mean(clean, 1), abs=1e-5)
    assert found.change_KC == pytest.approx(change, abs=1e-5) and np.abs(change).max() > 1e-3
    assert found.at_active_KC == pytest.approx(at_active, abs=1e-4)
    silent = active == 0
    assert silent[1].any() and not silent[1].all() and not silent[0].any() and silent[2].all()
    assert not found.change_KC[silent].any()  # exactly
    assert found.clean_C.std() > 1e-3 and not np.allclose(change[0], at_active[0] / 11)


def test_figures_are_means_and_a_bootstrap_of_contexts(model):
    tokens = np.random.default_rng(0).integers(0, 300, (7, 12)).astype(np.uint32)
    of, rule = sae_and_rule(model, tokens, HOOK)
    found = ablate(model, of, rule, tokens, FEATURES, 7)
    for k in (0, 1):
        measured = changes(found, k)
        assert measured["active_rows"] == found.active_KC[k].sum() > 0
        assert measured["loss_change"]["value"] == pytest.approx(found.change_KC[k].mean())
        per_row = found.at_active_KC[k].sum() / found.active_KC[k].sum()
        assert measured["loss_change_active"]["value"] == pytest.approx(per_row)
        draws = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=1000)
        means = [np.repeat(found.change_KC[k], draw).mean() for draw in draws]
        rows = [(d * found.at_active_KC[k]).sum() / n for d in draws if (n := (d * found.active_KC[k]).sum())]
        for name, resampled in (("loss_change", means), ("loss_change_active", rows)):
            interval = [measured[name]["low"], measured[name]["high"]]
            assert interval == pytest.approx(np.quantile(resampled, (0.025, 0.975)).tolist(), rel=1e-9)
            assert interval[0] < interval[1]
    assert changes(found, 2) == {
        "active_rows": 0,
        "loss_change": {"value": 0.0, "low": 0.0, "high": 0.0},
        "loss_change_active": None,
    }
    one = ablate(model, of, rule, tokens[:1], FEATURES[:1], 7)
    assert changes(one, 0)["loss_change"]["low"] is None


def test_the_run_ablates_the_best_features_on_reasoning_text(run_folder):
    settings = ("evaluate.ablation={features: 3, contexts: 5, batch_contexts: 2}", "evaluate.features=null")
    ran = pipeline("evaluate", *settings, "evaluate.steering.op=set", "evaluate.steering.where=prompt")
    assert ran.status == 0, ran.out
    folder = max(run_folder.glob("runs/evaluate/*"), key=lambda path: path.stat().st_mtime)
    sae = read_figures(folder).own(HOOK)
    best = [row["feature"] for row in sae.lists["reason_score"]["top"] if row["score"] > 0][:3]
    listed = sae.lists["ablation"]
    assert [row["feature"] for row in listed["features"]] == best and listed["sources"] == ["reasoning"]
    assert sae.value("contexts", "ablation") == 5 and sae.value("ce_clean", "ablation") > 1
    assert sae.figure("ce_clean", "ablation").definition
    html = (folder / "report.html").read_text()
    table = html[html.index('<h3 id="ablation-1">') :]
    table = table[: table.index("</table>")]
    for row in listed["features"]:
        change = row["loss_change"]
        assert f"<td>{change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]</td>" in table
    steering = sae.lists["steering"]
    assert {(f["op"], f["where"]) for f in steering["features"]} == {("set", "prompt")}
    as_it_is, steered = steering["features"][0]["by_strength"]
    assert as_it_is["strength"] is None and steered["strength"] == 4
    assert as_it_is["changed"] == 0 < steered["changed"] < steered["processed"]
    assert "at every position of the prompt" in html and "with one feature set: at strength" in html


def test_there_is_none_without_a_score_or_text_to_read(run_folder):
    quick = [f"evaluate.{name}=null" for name in ("downstream", "features", "diff", "steering")]
    ran = pipeline("evaluate", *quick, "evaluate.reason_score=null")
    assert ran.status == 0, ran.out
    settings = json.loads(next(run_folder.glob("runs/sample/*/manifest.json")).read_text())["settings"]
    assert only(run_folder, "runs/train/*") and settings["sources"]
    made = [read_figures(path.parent) for path in run_folder.glob("runs/evaluate/*/metrics.json")]
    assert sorted("ablation" in each.own(HOOK).lists for each in made) == [False, True]
