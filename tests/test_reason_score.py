import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import only, pipeline

from evaluate.reason_score import Rows, Sums, accumulate, reason_score
from evaluate.words import find_words, overrepresented, spellings, word_groups
from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.sampling import Contexts
from harvest.tokenizer import load_tokenizer
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.exclusion import kept_rows

HOOK = "model.layers.1"


def naive(folder, words, window, ignored, alpha, source=None):
    """ReasonScore as the paper writes it: a loop over features, words and tokens of the held-out contexts."""
    store = ActivationStore.open(only(folder, "runs/harvest/*/store"))
    contexts = Contexts(only(folder, "runs/sample/*/contexts"))
    saved = load_sae(only(folder, f"runs/train/*/{HOOK}"))
    tokenizer = load_tokenizer(ModelConfig(name=str(folder / "assets/tiny-llama")), None, True)
    tokens = contexts.read("holdout", "tokens", 0, contexts.count("holdout"))
    sources = contexts.read("holdout", "source", 0, len(tokens))
    g = store.geometry
    counted = np.zeros(tokens.shape, bool)
    acts = np.zeros((*tokens.shape, saved.sae.d_sae))
    for shard in range(g.holdout_shards):
        chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
        rows = np.concatenate([store.read_chunk("holdout", HOOK, chunk) for chunk in chunks])
        x = torch.from_numpy(rows).view(torch.bfloat16).double() * saved.statistics.scale
        f = torch.relu(x @ saved.sae.W_enc.double() + saved.sae.b_enc.double()).numpy()
        c, p = (store.read_provenance("holdout", name, shard) for name in ("context", "position"))
        acts[c, p] = f
        counted[c, p] = kept_rows(store, "holdout", HOOK, shard, ExcludeConfig(), saved.statistics.norm_limit)
    counted &= ~np.isin(tokens, ignored)
    if source is not None:
        counted &= (sources == contexts.sources.index(source))[:, None]
    acts *= np.linalg.norm(saved.sae.W_dec.double().numpy(), axis=1) / saved.statistics.scale
    masks = []
    for word in words:
        mask = np.zeros(tokens.shape, bool)
        for text in (word, f" {word}", word.capitalize(), f" {word.capitalize()}"):
            ids = tokenizer.whole.encode(text, add_special_tokens=False).ids
            for c, row in enumerate(tokens.tolist()):
                for start in range(len(row) - len(ids) + 1):
                    if row[start : start + len(ids)] == ids:
                        mask[c, max(0, start - window[0]) : start + len(ids) + window[1]] = True
        masks.append(mask & counted)
    inside = np.logical_or.reduce(masks)
    outside = counted & ~inside
    plus = [acts[inside, i].mean() for i in range(acts.shape[2])]
    minus = [acts[outside, i].mean() for i in range(acts.shape[2])]
    scores = []
    for i in range(acts.shape[2]):
        means = [acts[mask, i].mean() for mask in masks]
        p = [mean / sum(means) if sum(means) else 0 for mean in means]
        entropy = -sum(q * math.log(q) for q in p if q) / math.log(len(words))
        scores.append(plus[i] / sum(plus) * entropy**alpha - minus[i] / sum(minus))
    return np.array(scores)


@pytest.mark.parametrize(
    "extra", [[], ["evaluate.reason_score.ignored_token_ids=[0,30,31]", "evaluate.reason_score.window=[0,3]"]]
)
def test_scores_are_the_papers_formula(run_folder, extra):
    ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.reason_score.sources=[reasoning]", *extra)
    assert ran.status == 0, ran.out
    written = np.load(max(run_folder.glob(f"runs/evaluate/*/reason_score-{HOOK}.npz"), key=lambda p: p.stat().st_mtime))
    window, ignored = ((0, 3), [0, 30, 31]) if extra else ((1, 2), [])
    expected = naive(run_folder, written["words"].tolist(), window, ignored, 0.7, "reasoning")
    assert np.allclose(written["score"], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-4
    assert written["word_means"].shape == (3, len(expected))


def test_rows_of_the_store_and_of_the_model_give_one_score(run_folder):
    """Contexts that the store lacks are read by the model, in one forward pass."""
    found = {}
    for rows_from in ("store", "model"):
        shutil.rmtree(run_folder / "runs" / "evaluate")
        if rows_from == "model":
            only(run_folder, "runs/harvest/*/store/train/shards/00000.json").unlink()
        ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.reason_score.contexts=40")
        assert ran.status == 0, ran.out
        metrics = json.loads(only(run_folder, "runs/evaluate/*/metrics.json").read_text())
        found[rows_from] = metrics["saes"][HOOK]["reason_score"]
        assert found[rows_from]["rows_from"] == rows_from
        assert found[rows_from]["model_passes"] == (rows_from == "model")
    store, model = found["store"], found["model"]
    assert model["words"] == store["words"]
    assert model["rows_outside"] == store["rows_outside"]
    best = {row["feature"]: row["score"] for row in model["top"]}
    for row in store["top"]:
        assert best[row["feature"]] == pytest.approx(row["score"], rel=0.01, abs=1e-5)  # bfloat16 rows, other batches


def test_sums_over_batches_are_masked_sums(finished):
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    inside = np.zeros((2, 100), bool)
    inside[0, :10] = inside[1, 5:20] = True
    counted = np.arange(100) != 7
    batches = [Rows(rows[s], inside[:, s], counted[s], np.array([1, 2])) for s in (slice(0, 60), slice(60, 100))]
    sums = accumulate(saved, iter(batches), 2)
    f = saved.sae.encode(rows.float() * saved.statistics.scale).double().numpy()
    for g, mask in enumerate((inside[0], inside[1], inside.any(0), ~inside.any(0))):
        assert np.allclose(sums.of_acts_GF[g], f[mask & counted].sum(0), rtol=1e-6)
        assert sums.rows_G[g] == (mask & counted).sum()
    assert sums.matches_W.tolist() == [2, 4]


def test_entropy_rewards_features_that_fire_at_all_words():
    sums = Sums(np.array([[2.0, 4, 0], [2, 0, 0], [4, 4, 0], [1, 1, 0]]), np.array([1, 1, 2, 1]), np.zeros(2))
    found = reason_score(sums, np.ones(3), 0.7)
    assert found.entropy_F.tolist() == [1, 0, 0]
    assert found.score_F.tolist() == [0, -0.5, 0]
    assert reason_score(sums, np.ones(3), 0).score_F.tolist() == [0, 0, 0]


def test_spellings():
    assert spellings("wait") == ["wait", " wait", "Wait", " Wait"]
    assert spellings("But") == ["But"]
    assert spellings("hmm| hm") == ["hmm", " hmm", "Hmm", " Hmm", " hm"]


def test_words_of_several_tokens_are_matched_as_sequences(finished):
    tokenizer = load_tokenizer(ModelConfig(name=str(finished / "assets/tiny-llama")), None, True)
    groups = word_groups(["let me", "perhaps"], tokenizer)
    assert all(len(ids) > 1 for ids in groups["perhaps"])
    text = tokenizer.plain.encode("so let me wait perhaps", add_special_tokens=False).ids
    found = find_words(np.array([text, text[::-1]], np.uint32), groups, (0, 0))
    words = [
        tokenizer.plain.decode([t for t, inside in zip(text, mask, strict=True) if inside])
        for mask in found.inside_WCS[:, 0]
    ]
    assert words == [" let me", " perhaps"]
    assert found.matches_W.tolist() == [1, 1]
    assert not found.inside_WCS[:, 1].any()


def test_windows_end_with_the_context():
    tokens = np.array([[7, 1, 1, 1, 7], [1, 1, 7, 1, 1]])
    found = find_words(tokens, {"seven": [(7,)]}, (1, 2))
    assert found.inside_WCS[0].astype(int).tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert find_words(tokens, {"long": [(7,) * 6]}, (1, 2)).matches_W.tolist() == [0]


def test_typical_words():
    here = ["therefore the sum is even " * 20, "since the sum is odd " * 20]
    found = overrepresented(here, ["the cat is here " * 40])
    assert found[0]["word"] == "sum"
    assert {"cat", "here", "the"}.isdisjoint(row["word"] for row in found)
    assert overrepresented(here, []) == []


def test_absent_words_are_named(run_folder):
    shutil.rmtree(run_folder / "runs" / "evaluate")
    ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.reason_score.words=[wait,zebra]")
    assert ran.status == 0, ran.out
    assert "left out: zebra" in ran.out
    folder = only(run_folder, "runs/evaluate/*")
    found = json.loads((folder / "metrics.json").read_text())["saes"][HOOK]["reason_score"]
    assert found["absent_words"] == ["zebra"]
    assert list(found["top"][0]["word_means"]) == ["wait"]
    assert "zebra" in (folder / "report.html").read_text()


def test_no_word_at_all_is_said(run_folder):
    shutil.rmtree(run_folder / "runs" / "evaluate")
    ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.reason_score.words=[zebra]")
    assert ran.status == 0, ran.out
    folder = only(run_folder, "runs/evaluate/*")
    found = json.loads((folder / "metrics.json").read_text())["saes"][HOOK]["reason_score"]
    assert "none of the words zebra stands in the text" in found["message"]
    assert found["message"] in (folder / "report.html").read_text()
    assert not list(folder.glob("reason_score*"))


def test_bad_settings_are_named(run_folder):
    ran = pipeline("evaluate", "evaluate.reason_score.sources=[novels]")
    assert ran.status == 1
    assert "evaluate.reason_score.sources: 'novels': no such source; one of chat, reasoning" in ran.out
    ran = pipeline("evaluate", "evaluate.reason_score.contexts=1000000")
    assert ran.status == 1
    assert "there are" in ran.out
