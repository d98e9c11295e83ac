"""What tokens say of every feature, against a plain loop over all rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import only
from test_activity import HOOK

from evaluate import token_identity
from evaluate.halves import second_half
from evaluate.subject import feed
from evaluate.token_identity import TokenIdentity, TokenSums, read_identity, write_identity
from harvest.activation_rows import stored_rows
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from harvest.files import UserError
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.exclusion import Exclusion


def naive(feature: int, acts: np.ndarray, token: np.ndarray, source: np.ndarray, second: np.ndarray) -> dict:
    """The figures of one feature: a loop over tokens and rows, as the issue defines them."""
    f = acts[:, feature].astype(np.float64)
    spread = ((f - f.mean()) ** 2).sum()
    between = sum((token == t).sum() * (f[token == t].mean() - f.mean()) ** 2 for t in set(token.tolist()))
    eta = between / spread if spread else np.nan
    adjusted = 1 - (1 - eta) * (len(f) - 1) / (len(f) - len(set(token.tolist())))
    base = (f[~second] > 0).sum() / (~second).sum()
    rates = []
    for t in sorted(set(token[~second].tolist())):
        here = f[~second & (token == t)] > 0
        if here.any():
            rates.append(((here.sum() - base * len(here)) / (len(here) + 4), t))
    rates = sorted(((rate, t) for rate, t in rates if rate > 0), key=lambda each: (-each[0], each[1]))[:10]
    own = [t for rate, t in rates if rate >= rates[0][0] / 2]
    counts = [[second & (token == t) & (source == s) for s in (0, 1)] for t in own]
    inside, outside = (np.isin(token, own) & second & (source == s) for s in (1, 0))
    return {
        "explained": adjusted,
        "eta_squared": eta,
        "token": own,
        "active": [[int((f[rows] > 0).sum()) for rows in each] for each in counts],
        "rows": [[int(rows.sum()) for rows in each] for each in counts],
        "inside": (f[inside] > 0).mean() if inside.any() else np.nan,
        "outside": (f[outside] > 0).mean() if outside.any() else np.nan,
    }


def check(found: TokenIdentity, features, acts, token, source, second) -> None:
    for feature in features:
        expected = naive(feature, acts, token, source, second)
        used = found.token[feature] >= 0
        for name in ("token", "active", "rows"):
            assert getattr(found, name)[feature][used].tolist() == expected[name], (feature, name)
        for name in ("explained", "eta_squared", "inside", "outside"):
            assert getattr(found, name)[feature] == pytest.approx(expected[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def rows_of(finished):
    """Rows, SAE, contexts and activations of the finished run, first positions left out."""
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    saved.sae.b_enc[5] = -1e9  # never fires
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    rules = {HOOK: Exclusion(ExcludeConfig(positions=(0,)))}
    return saved, contexts, list(stored_rows(store, "holdout", rules, 100, contexts=contexts))


def test_figures_of_all_features_are_those_of_a_plain_loop(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(token_identity, "PENDING", 1000)  # several merges
    saved, contexts, batches = rows_of(finished)
    count = contexts.count("holdout")
    tokens, source = (contexts.read("holdout", name, 0, count) for name in ("tokens", "source"))
    second = second_half(contexts, "holdout")
    sums = TokenSums(saved.sae.d_sae, tokens, source, second)
    feed(saved, batches, [sums])
    write_identity(tmp_path / "identity.npz", sums.result(contexts.sources, [1]))
    found = read_identity(tmp_path / "identity.npz")
    assert found and found.sources.tolist() == ["chat", "reasoning"] and found.reasoning.tolist() == [False, True]
    kept = [batch.at(batch.kept) for batch in batches]
    acts = np.concatenate([saved.sae.encode(batch.acts[HOOK].float()).numpy() for batch in kept])
    token, where, source = (np.concatenate([getattr(b, n) for b in kept]) for n in ("token", "context", "source"))
    in_second = second[where, np.concatenate([batch.position for batch in kept])]
    check(found, range(saved.sae.d_sae), acts, token.astype(np.int64), source, in_second)
    assert np.isnan(found.explained[5]) and (found.token[5] == -1).all()
    assert read_identity(tmp_path / "none.npz") is None
    (tmp_path / "identity.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        read_identity(tmp_path / "identity.npz")


def made(f_BF: torch.Tensor, token: np.ndarray) -> TokenIdentity:
    """Of activations at these tokens, all of one source, in contexts of one token each."""
    count = np.arange(len(token))
    second = (count % 2 == 1)[:, None]
    sums = TokenSums(f_BF.shape[1], token[:, None], np.zeros(len(token), np.uint8), second)
    rows = SimpleNamespace(token=token, context=count, position=0 * count, kept=np.ones(len(token), bool))
    sums.add(SimpleNamespace(rows=rows, f_BF=f_BF))
    return sums.result(["text"], [0])


def test_chance_explains_nothing_though_most_tokens_are_rare():
    """Of 3,000 rows most tokens occur once or twice, so η² of noise is far from 0."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, 2000, 3000)
    noise = np.maximum(rng.normal(size=(3000, 40)) - 1.5, 0)
    detector = (token % 7 == 0)[:, None] * rng.uniform(1, 3, (3000, 1))
    found = made(torch.from_numpy(np.concatenate([noise, detector], 1)), token)
    tokens = len(set(token.tolist()))
    assert found.eta_squared[:40].mean() == pytest.approx((tokens - 1) / 2999, rel=0.03)
    assert abs(found.explained[:40].mean()) < 0.03
    assert found.explained[40] > 0.7
    assert np.isnan(found.outside).all()


def test_the_size_of_activations_does_not_matter():
    rng = np.random.default_rng(0)
    token = rng.integers(0, 50, 500)
    f_BF = torch.from_numpy(np.maximum(rng.normal(size=(500, 3)) + token[:, None] % 3 - 1, 0))
    large, small = made(f_BF, token), made(f_BF * 2**-14, token)
    assert (small.eta_squared == large.eta_squared).all() and (small.explained == large.explained).all()


def test_pairs_that_are_dropped_for_memory_make_a_lower_bound(monkeypatch, capsys):
    rng = np.random.default_rng(0)
    token = rng.integers(0, 50, 2000)
    f_BF = torch.from_numpy(np.maximum(rng.normal(size=(2000, 3)) + token[:, None] % 3 - 1, 0))
    whole = made(f_BF, token)
    monkeypatch.setattr(token_identity, "PAIRS", 60)
    bounded = made(f_BF, token)
    assert "pairs; a feature's rarest tokens were dropped" in capsys.readouterr().out
    assert (bounded.eta_squared < whole.eta_squared).all()


def test_no_document_is_in_both_halves_and_a_prompt_s_documents_are_together(finished):
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    count = contexts.count("holdout")
    document = contexts.read("holdout", "document", 0, count)
    source, second = contexts.read("holdout", "source", 0, count), second_half(contexts, "holdout")
    for s in (0, 1):
        here, halves = document[source == s], second[source == s]
        for each in np.unique(here):
            assert len(np.unique(halves[here == each])) == 1
        assert 0.3 < halves.mean() < 0.7


def test_a_document_is_where_its_middle_is():
    """Of 12 tokens in documents of 2, 6 and 4, in the order of their first tokens, the middles are 1, 5 and 10."""
    document = np.array([[7] * 2 + [3] * 6 + [5] * 4])
    arrays = {"tokens": document * 0 + [[1] * 2 + [2] * 6 + [3] * 4], "document": document, "source": np.zeros(1)}
    second = second_half(SimpleNamespace(count=lambda _: 1, read=lambda _, name, *__: arrays[name]), "holdout")
    assert second.tolist() == [[False] * 8 + [True] * 4]


def test_documents_of_a_prompt_are_together_though_contexts_are_shuffled():
    """Forty documents of ten prompts, laid end to end as packing does, so that many are cut between two contexts."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 100, (10, 20))
    number = rng.permutation(40)
    texts = [np.concatenate([prompts[n % 10], rng.integers(0, 100, rng.integers(5, 40))]) for n in number]
    whole = sum(map(len, texts)) // 128 * 128
    tokens, document = np.concatenate(texts)[:whole], np.repeat(number, [len(text) for text in texts])[:whole]
    order = rng.permutation(whole // 128)
    arrays = {"tokens": tokens.reshape(-1, 128)[order], "document": document.reshape(-1, 128)[order]}
    arrays["source"] = np.zeros(len(order), np.uint8)
    second = second_half(SimpleNamespace(count=lambda _: len(order), read=lambda _, name, *__: arrays[name]), "holdout")
    assert 0.4 < second.mean() < 0.6
    halves = {n: set(second[arrays["document"] == n].tolist()) for n in np.unique(document)}
    assert all(len(each) == 1 for each in halves.values())
    both = [p for p in range(10) if len(set.union(*(halves[n] for n in halves if n % 10 == p))) > 1]
    assert len(both) <= 1
