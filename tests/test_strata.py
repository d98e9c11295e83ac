"""Figures of strata: two of one source, of unlike size and mean, beside a source without any."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import only, pipeline
from made_rows import batches, measured
from transformers import AutoModelForCausalLM

from evaluate.fidelity import BLOCKS
from evaluate.figures import EVERY, read_figures
from evaluate.groups import Groups, by_source, context_groups, finest
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from train.checkpoint import SavedSae, load_sae
from train.exclusion import InputStatistics
from train.standard import Standard

HOOK = "model.layers.1"
STRATA = [{"source": "reasoning", "value": "math"}, {"source": "reasoning", "value": "<b>code"}]
NAMES = ["chat", "reasoning", "reasoning/math", "reasoning/<b>code"]
NONE = 65_535


def stratum_of(source_C: np.ndarray) -> np.ndarray:
    """Of every four contexts of the second source, one is code, and the third context has no stratum at all."""
    rank_C = (source_C == 1).cumsum() - 1
    stratum_C = np.where(source_C == 1, (rank_C % 4 == 1).astype(np.uint16), NONE)
    stratum_C[(source_C == 1) & (rank_C == 2)] = NONE
    return stratum_C.astype(np.uint16)


class Stratified(Contexts):
    """The contexts of a run as if the sample had recorded strata."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.strata = STRATA

    def read(self, split: str, name: str, first: int, count: int) -> np.ndarray:
        if name == "stratum":
            return stratum_of(super().read(split, "source", 0, self.count(split)))[first : first + count]
        return super().read(split, name, first, count)


def groups_of(source_C: np.ndarray) -> Groups:
    stratum_C = stratum_of(source_C)
    masks = (source_C == 0, source_C == 1, stratum_C == 0, stratum_C == 1)
    return dict(zip(NAMES, masks, strict=True))


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """(folder of the evaluation, the run's folder): the finished run evaluated anew, with strata."""
    folder = tmp_path_factory.mktemp("strata") / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "runs" / "evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("evaluate.run.Contexts", Stratified)
        ran = pipeline("evaluate", "evaluate.steering=null", "evaluate.downstream.contexts=24")
    assert ran.status == 0, ran.out
    return only(folder, "runs/evaluate/*"), folder


def heldout(folder):
    """(rows, context, source by context) of the held-out split as float64 and plain arrays."""
    store = ActivationStore.open(only(folder, "runs/harvest/*/store"))
    chunks = range(store.geometry.holdout_shards * store.geometry.chunks_per_shard)
    rows = np.concatenate([store.read_chunk("holdout", HOOK, chunk) for chunk in chunks])
    context = np.concatenate([store.read_provenance("holdout", "context", s) for s in (0, 1)])
    contexts = Contexts(only(folder, "runs/sample/*/contexts"))
    source_C = contexts.read("holdout", "source", 0, contexts.count("holdout"))
    return torch.from_numpy(rows).view(torch.bfloat16).double().numpy(), context, source_C


def by_group(evaluated, section, rows):
    """Values and intervals of a section's figures by group, then name."""
    found = {}
    for (counted, group), figures in read_figures(evaluated[0]).own(HOOK).table(section).items():
        if counted == rows:
            values = {name: figure.value for name, figure in figures.items()}
            found[group] = values | {f"{name}_interval": f.interval for name, f in figures.items()}
    return found


def test_fidelity_of_strata_is_that_of_their_rows(evaluated):
    found = by_group(evaluated, "fidelity", EVERY)
    assert list(found) == ["all", *NAMES]
    x, context, source_C = heldout(evaluated[1])
    saved = load_sae(only(evaluated[1], f"runs/train/*/{HOOK}"))
    sae, scale = saved.sae, saved.statistics.scale
    f = np.maximum(x * scale @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy(), 0)
    error = np.square((f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()) / scale - x).sum(1)
    explained = {}
    for name, mask_C in groups_of(source_C).items():
        rows = mask_C[context]
        explained[name] = 1 - error[rows].sum() / np.square(x[rows] - x[rows].mean(0)).sum()
        assert found[name]["rows"] == rows.sum()
        assert found[name]["explained_variance"] == pytest.approx(explained[name], abs=1e-5)
        assert found[name]["l0"] == pytest.approx((f[rows] > 0).sum(1).mean(), rel=1e-4)
        low, high = found[name]["mse_interval"]
        assert low < found[name]["mse"] < high
    assert len({round(value, 4) for value in explained.values()}) == 4
    sizes = [found[name]["rows"] for name in ("reasoning", "reasoning/math", "reasoning/<b>code")]
    assert sizes[0] == sizes[1] + sizes[2] + 16  # the context of no stratum
    assert sizes[1] > 2 * sizes[2]


def test_cross_entropy_of_strata_is_the_mean_over_their_contexts(evaluated):
    """The model whole, as transformers runs it."""
    found = by_group(evaluated, "downstream", "")
    contexts = Contexts(only(evaluated[1], "runs/sample/*/contexts"))
    source_C = contexts.read("holdout", "source", 0, 24)
    tokens = torch.from_numpy(contexts.read("holdout", "tokens", 0, 24).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(evaluated[1] / "assets/tiny-llama", dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].transpose(1, 2)
    loss_C = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1).double().numpy()
    everything = contexts.read("holdout", "source", 0, contexts.count("holdout"))
    for name, mask_C in groups_of(everything).items():
        chosen_C = mask_C[:24]
        assert found[name]["contexts"] == chosen_C.sum()
        assert found[name]["ce_clean"] == pytest.approx(loss_C[chosen_C].mean(), rel=1e-4)
        low, high = found[name]["ce_clean_interval"]
        assert low <= found[name]["ce_clean"] <= high
    assert len(source_C) == 24


def test_the_report_shows_strata_under_their_source(evaluated):
    html = (evaluated[0] / "report.html").read_text()
    rows = re.findall(r"<tr><td[^>]*>([^<]*), all rows</td><td>([\d,]+)</td>", html)
    expected = by_group(evaluated, "fidelity", EVERY)
    names = ["all", *NAMES]
    escaped = [name.replace("<b>", "&lt;b&gt;") for name in names]
    assert rows == [(shown, f"{expected[name]['rows']:,}") for shown, name in zip(escaped, names, strict=True)]
    header = re.search(r"<thead><tr><th>nats</th>(.*?)</tr></thead>", html)
    assert header
    assert re.findall(r"<th>(.*?)</th>", header[1]) == escaped


def test_a_features_page_counts_by_stratum(evaluated):
    x, context, source_C = heldout(evaluated[1])
    sae = read_figures(evaluated[0]).own(HOOK)
    feature = sae.lists["feature_pages"]["numbers"][0]
    saved = load_sae(only(evaluated[1], f"runs/train/*/{HOOK}"))
    before = x * saved.statistics.scale @ saved.sae.W_enc[:, feature].double().numpy() + float(saved.sae.b_enc[feature])
    limit = sae.value("norm_limit")
    kept = np.linalg.norm(x, axis=1) <= limit
    html = (evaluated[0] / "features" / HOOK / f"{feature}.html").read_text()
    lines = re.findall(r"<tr><td>([^<]*)</td><td>([\d.e-]+)%</td>", html)
    masks = groups_of(source_C)
    assert [name.replace("&lt;b&gt;", "<b>") for name, _ in lines] == NAMES
    for (_, percent), mask_C in zip(lines, masks.values(), strict=True):
        density = (before[kept & mask_C[context]] > 0).mean()
        assert float(percent) == pytest.approx(100 * density, rel=0.01, abs=0.01)


def test_intervals_of_a_small_stratum_come_from_all_of_its_contexts():
    """Where contexts are too many for a sum of each, those of a group are still spread over blocks of its own."""
    count = 2 * BLOCKS + 200
    source_C = (np.arange(count) % BLOCKS >= 10).astype(np.uint8)  # the first source fills ten blocks of a common count
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(count, 4)) * (1 + source_C[:, None])).bfloat16()
    saved = SavedSae(Standard.initial(4, 8), HOOK, InputStatistics(1.0, 1.0, None), {})
    small = source_C == 0
    found = measured(saved, batches(rows, np.arange(count)), by_source(source_C, ["a", "b"]))
    alone = batches(rows[torch.from_numpy(small)], np.arange(small.sum()))
    ones = by_source(np.zeros(small.sum(), np.uint8), ["a"])
    expected = measured(saved, alone, ones).figures["all_rows"]["a"]
    figures = found.figures["all_rows"]["a"]
    assert figures["mse_interval"] == pytest.approx(expected["mse_interval"])
    assert figures["rows"] == small.sum() == 30


def test_groups_of_contexts_that_were_sampled_without_strata(finished):
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    groups = context_groups(contexts, "holdout")
    source_C = contexts.read("holdout", "source", 0, contexts.count("holdout"))
    assert list(groups) == ["chat", "reasoning"]
    assert (groups["reasoning"] == (source_C == 1)).all()


def test_the_finest_groups_cover_each_context_once():
    source_C = np.array([1, 0, 1, 1, 0, 1, 1, 1])
    groups = groups_of(source_C)
    names, index_C = finest(groups, len(source_C))
    assert names == NAMES  # a context of the second source is in no stratum
    assert [names[i] for i in index_C] == [
        *("reasoning/math", "chat", "reasoning/<b>code", "reasoning"),
        *("chat", "reasoning/math", "reasoning/math", "reasoning/<b>code"),
    ]
    groups["reasoning/math"] = groups["reasoning"] & ~groups["reasoning/<b>code"]
    names, _ = finest(groups, len(source_C))
    assert names == ["chat", "reasoning/math", "reasoning/<b>code"]
