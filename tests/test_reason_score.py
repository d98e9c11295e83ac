import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import real
import torch
from conftest import TINY, only, pipeline
from made_rows import batches
from tokenizers import Tokenizer

from evaluate.figures import read_figures
from evaluate.reason_score import Sums, WordSums, reason_score
from evaluate.spellings import spellings
from evaluate.subject import feed
from evaluate.words import find_words, overrepresented, word_groups
from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.contexts import Contexts
from harvest.tokenizer import load_tokenizer
from train.checkpoint import load_sae

HOOK = "model.layers.1"


def naive(folder: Path, spellings: dict[str, list[str]], window: tuple[int, int], ignored: list[int], source: str):
    """ReasonScore as the paper writes it: a loop over features, words and tokens of a source's held-out contexts.

    (scores, the sum of the magnitudes of each score's two terms)
    """
    (manifest,) = (json.loads(path.read_text()) for path in folder.glob("runs/harvest/*/manifest.json"))
    hook, model = manifest["settings"]["hooks"][0], manifest["settings"]["model"]["name"]
    store = ActivationStore.open(only(folder, "runs/harvest/*/store"))
    contexts = Contexts(only(folder, "runs/sample/*/contexts"))
    saved = load_sae(only(folder, f"runs/train/*/{hook}"))
    tokenizer = Tokenizer.from_file(str(folder / model / "tokenizer.json"))
    tokens = contexts.read("holdout", "tokens", 0, contexts.count("holdout"))
    sources = contexts.read("holdout", "source", 0, len(tokens))
    g = store.geometry
    counted = np.zeros(tokens.shape, bool)
    acts = np.zeros((*tokens.shape, saved.sae.d_sae))
    for shard in range(g.holdout_shards):
        chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
        rows = np.concatenate([store.read_chunk("holdout", hook, chunk) for chunk in chunks])
        x = torch.from_numpy(rows).view(torch.bfloat16).double()
        f = torch.relu(x * saved.statistics.scale @ saved.sae.W_enc.double() + saved.sae.b_enc.double()).numpy()
        c, p = (store.read_provenance("holdout", name, shard) for name in ("context", "position"))
        acts[c, p] = f
        counted[c, p] = (x.norm(dim=1) <= (saved.statistics.norm_limit or math.inf)).numpy()
    counted &= ~np.isin(tokens, ignored)
    counted &= (sources == contexts.sources.index(source))[:, None]
    acts *= np.linalg.norm(saved.sae.W_dec.double().numpy(), axis=1) / saved.statistics.scale
    masks = []
    for texts in spellings.values():
        mask = np.zeros(tokens.shape, bool)
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            for c, row in enumerate(tokens.tolist()):
                for start in range(len(row) - len(ids) + 1):
                    if row[start : start + len(ids)] == ids:
                        mask[c, max(0, start - window[0]) : start + len(ids) + window[1]] = True
        masks.append(mask & counted)
    inside = np.logical_or.reduce(masks)

    def means(mask: np.ndarray) -> np.ndarray:
        return mask.ravel() @ acts.reshape(mask.size, -1) / mask.sum()

    plus, minus, of_words = means(inside), means(counted & ~inside), [means(mask) for mask in masks]
    gains, losses = [], []
    for i in range(acts.shape[2]):
        total = sum(mean[i] for mean in of_words)
        p = [mean[i] / total if total else 0 for mean in of_words]
        entropy = -sum(q * math.log(q) for q in p if q) / math.log(len(masks))
        gains.append(plus[i] / sum(plus) * entropy**0.7)
        losses.append(minus[i] / sum(minus))
    return np.array(gains) - losses, np.array(gains) + losses


def four(word: str) -> list[str]:
    return [word, f" {word}", word.capitalize(), f" {word.capitalize()}"]


def evaluated(*settings: str, config: Path = TINY) -> dict[str, np.ndarray]:
    """The arrays of ReasonScore of an evaluation in the current folder."""
    parts = ("downstream", "features", "token_injection", "steering", "ablation", "diff")
    settings = (*settings, *(f"evaluate.{part}=null" for part in parts), "evaluate.reason_score.sources=[reasoning]")
    ran = pipeline("evaluate", *settings, config=config)
    assert ran.status == 0, ran.out
    folder = Path(pipeline("path", "evaluate", *settings, config=config).out.strip())
    return dict(np.load(next(folder.glob("reason_score-*.npz"))))


@pytest.mark.parametrize(("window", "ignored"), [((1, 2), []), ((0, 3), [0, 30, 31])])
def test_scores_are_the_papers_formula(run_folder, window, ignored):
    setting = "evaluate.reason_score"
    written = evaluated(f"{setting}.ignored_token_ids={ignored}", f"{setting}.window={list(window)}")
    expected, _ = naive(run_folder, {w: four(w) for w in ("wait", "therefore", "let me")}, window, ignored, "reasoning")
    assert np.allclose(written["score"], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-4
    assert written["word_means"].shape == (3, len(expected))


REAL_WORDS = {
    "therefore": four("therefore"),
    "since": four("since"),
    "let us": [*four("let us"), *four("let's")],
    "simplifying": ["Simplifying"],  # three tokens; with a capital it is taken as it is
    "so": [" So"],
}


@pytest.mark.parametrize(("window", "ignored"), [((1, 2), []), ((2, 5), [28, 30, 198])])  # , . and the line break
def test_scores_are_the_papers_formula_on_real_tokens(real_folder, window, ignored):
    """SmolLM2's tokens of the embedded text, and its activations there: each feature to 1e-6 of the largest score.

    And to 1e-6 of its own two terms, but for a few that hardly fire: encoding in float32 rounds them by more.
    """
    settings = {"words": '[therefore,since,"let us|let\'s",Simplifying," So"]', "window": list(window)}
    settings |= {"ignored_token_ids": ignored}
    written = evaluated(
        *real.SETTINGS, *(f"evaluate.reason_score.{n}={v}" for n, v in settings.items()), config=real.CONFIG
    )
    expected, terms = naive(real_folder, REAL_WORDS, window, ignored, "reasoning")
    assert written["word_means"].shape == (5, 768)
    assert (terms > 0).mean() > 0.9 and (written["entropy"] > 0.5).mean() > 0.4
    error = np.abs(written["score"] - expected)
    assert error.max() <= 1e-6 * np.abs(expected).max()
    assert (error <= 1e-6 * terms).mean() > 0.99


def test_rows_of_the_store_and_of_the_model_give_one_score(run_folder):
    """Contexts that the store lacks are read by the model, in one forward pass."""
    found = {}
    for rows_from in ("store", "model"):
        shutil.rmtree(run_folder / "runs" / "evaluate")
        if rows_from == "model":
            only(run_folder, "runs/harvest/*/store/train/shards/00000.json").unlink()
        ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.reason_score.contexts=40")
        assert ran.status == 0, ran.out
        sae = read_figures(only(run_folder, "runs/evaluate/*")).own(HOOK)
        found[rows_from] = sae.lists["reason_score"]
        assert found[rows_from]["rows_from"] == rows_from
        assert sae.value("model_passes") == (rows_from == "model")
        assert sae.value("contexts_of_training") == 3
        found[rows_from]["rows_outside"] = sae.value("rows_outside")
    store, model = found["store"], found["model"]
    assert model["words"] == store["words"]
    assert model["rows_outside"] == store["rows_outside"] > 0
    assert [row["rank"] for row in store["top"]] == [*range(1, len(store["top"]) + 1)]
    best = {row["feature"]: row["score"] for row in model["top"]}
    for row in store["top"]:
        assert best[row["feature"]] == pytest.approx(row["score"], rel=0.01, abs=1e-5)  # bfloat16 rows, other batches


def test_sums_over_batches_are_masked_sums(finished):
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    inside = np.zeros((2, 100), bool)
    inside[0, :10] = inside[1, 5:20] = True
    counted = np.arange(100) != 7
    sums = WordSums(saved, 2, lambda rows: (inside[:, rows.position], counted[rows.position]), piece_rows=32)
    feed(saved, batches(rows, np.zeros(100, int), ends=[60]), [sums])
    found = sums.result()
    f = saved.sae.encode(rows).double().numpy()
    for g, mask in enumerate((inside[0], inside[1], inside.any(0), ~inside.any(0))):
        assert np.allclose(found.of_acts_GF[g], f[mask & counted].sum(0), rtol=1e-6)
        assert found.rows_G[g] == (mask & counted).sum()


def test_entropy_rewards_features_that_fire_at_all_words():
    sums = Sums(np.array([[2.0, 4, 0], [2, 0, 0], [4, 4, 0], [1, 1, 0]]), np.array([1, 1, 2, 1]))
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
    text = tokenizer.encode_text("so let me wait perhaps")
    found = find_words(np.array([text, text[::-1]], np.uint32), groups, (0, 0))
    words = [
        tokenizer.whole.decode([t for t, inside in zip(text, mask, strict=True) if inside])
        for mask in found.inside_WCS[:, 0]
    ]
    assert words == [" let me", " perhaps"]
    assert found.matches_WC.tolist() == [[1, 0], [1, 0]]
    assert not found.inside_WCS[:, 1].any()


def test_windows_end_with_the_context():
    tokens = np.array([[7, 1, 1, 1, 7], [1, 1, 7, 1, 1]])
    found = find_words(tokens, {"seven": [(7,)]}, (1, 2))
    assert found.inside_WCS[0].astype(int).tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert find_words(tokens, {"long": [(7,) * 6]}, (1, 2)).matches_WC.tolist() == [[0, 0]]


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
    found = read_figures(folder).own(HOOK).lists["reason_score"]
    assert found["absent_words"] == ["zebra"]
    assert list(found["top"][0]["word_means"]) == ["wait"]
    assert "zebra" in (folder / "report.html").read_text()


def test_no_word_at_all_is_said(run_folder):
    shutil.rmtree(run_folder / "runs" / "evaluate")
    ran = pipeline("evaluate", "evaluate.downstream=null", "evaluate.reason_score.words=[zebra]")
    assert ran.status == 0, ran.out
    folder = only(run_folder, "runs/evaluate/*")
    found = read_figures(folder).own(HOOK).lists["reason_score"]
    assert "none of the words zebra occurs in the text" in found["message"]
    assert found["message"] in (folder / "report.html").read_text()
    assert not list(folder.glob("reason_score*"))


def test_bad_sources_are_named_before_any_stage_runs(run_folder):
    ran = pipeline("run", "evaluate.reason_score.sources=[novels]")
    assert ran.status == 2
    assert "evaluate.reason_score.sources: 'novels': no such source; one of chat, reasoning" in ran.out


def test_more_contexts_than_there_are_take_all(run_folder):
    others = [f"evaluate.{name}=null" for name in ("downstream", "features", "steering")]
    ran = pipeline("evaluate", *others, "evaluate.reason_score.contexts=1000000")
    assert ran.status == 0, ran.out
    assert "evaluate.reason_score: 128 contexts, all that there are (1,000,000 asked for)" in ran.out
