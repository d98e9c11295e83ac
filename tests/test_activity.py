"""Activity of all features, against a plain look at whole contexts."""

import numpy as np
import pytest
import torch
from conftest import only

from evaluate import activity_sums
from evaluate.activity import LEFT_OUT, SAMPLED, read_activity, room, write_activity
from evaluate.activity_sums import ActivitySums
from evaluate.config import FeaturesConfig
from evaluate.subject import Encoded, feed
from harvest.activation_rows import stored_rows
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from harvest.files import UserError
from train.checkpoint import load_sae
from train.config import ExcludeConfig
from train.exclusion import Exclusion

HOOK = "model.layers.1"
CONFIG = FeaturesConfig(contexts=2, tokens=11)  # no whole bytes of bits


def measure(finished, config=CONFIG, batch_rows=100):
    """The finished run's activity without first positions, in batches that end within shards."""
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    source = contexts.read("holdout", "source", 0, contexts.count("holdout")).astype(np.int64)
    tokens = contexts.read("holdout", "tokens", 0, len(source))
    sums = ActivitySums(saved.sae.d_sae, tokens, (contexts.sources, source), store.geometry.shard_contexts, config)
    rule = Exclusion(ExcludeConfig(positions=(0,)))
    feed(saved, stored_rows(store, "holdout", {HOOK: rule}, batch_rows, contexts=contexts), [sums])
    return sums.result()


@pytest.fixture(scope="module")
def looked_at(finished, tmp_path_factory):
    """(activity as it is read back, activations (C, S, F) looked at plainly, tokens, source of each context)."""
    path = tmp_path_factory.mktemp("activity") / "activity.safetensors"
    write_activity(path, measure(finished))
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    source = contexts.read("holdout", "source", 0, contexts.count("holdout"))
    tokens = contexts.read("holdout", "tokens", 0, len(source))
    acts = np.zeros((*tokens.shape, saved.sae.d_sae))
    for shard in range(store.geometry.holdout_shards):
        rows = np.concatenate([store.read_chunk("holdout", HOOK, 4 * shard + i) for i in range(4)])
        x = torch.from_numpy(rows).view(torch.bfloat16).double().numpy() * saved.statistics.scale
        where = [store.read_provenance("holdout", name, shard) for name in ("context", "position")]
        acts[where[0], where[1]] = np.maximum(x @ saved.sae.W_enc.double().numpy() + saved.sae.b_enc.numpy(), 0)
    acts[:, 0] = LEFT_OUT
    return read_activity(path), acts, tokens, source


def test_sums_are_those_of_the_whole_contexts(looked_at):
    found, acts, _, source = looked_at
    assert found.groups == ["chat", "reasoning"]
    for g in (0, 1):
        inside = acts[source == g, 1:]
        assert found["rows"][g] == inside[..., 0].size
        assert np.array_equal(found["active"][g], (inside > 0).sum((0, 1)))
        assert np.allclose(found["sum"][g], inside.sum((0, 1)), rtol=1e-5)
        assert np.allclose(found["max"][g], inside.max((0, 1)), rtol=1e-5)
    for feature in range(acts.shape[2]):
        active = acts[..., feature][acts[..., feature] > 0]
        counts, _ = np.histogram(active, bins=64, range=(0, found["top"][feature]))
        # A value at an edge may go either way.
        assert np.abs(np.cumsum(counts - found["histogram"][feature])).max() <= 1
        assert found["top"][feature] / 2 < active.max() <= found["top"][feature] * (1 + 1e-5)


def test_excerpts_are_the_peaks_in_their_contexts(looked_at):
    found, acts, tokens, _ = looked_at
    for feature in range(acts.shape[2]):
        strongest, sampled = (found.excerpts(kind, feature) for kind in ("strongest", "sampled"))
        peaks = acts[..., feature].max(1)
        assert np.allclose(strongest.value_N, np.sort(peaks[peaks > 0])[::-1][: 2 * 3], rtol=1e-5)
        for excerpts in (strongest, sampled):
            assert (excerpts.value_N > 0).all()
            for n, (context, start) in enumerate(zip(excerpts.context_N, excerpts.start_N, strict=True)):
                window = slice(start, start + 11)
                assert np.array_equal(excerpts.token_NT[n], tokens[context, window])
                assert np.allclose(excerpts.acts_NT[n], acts[context, window, feature], rtol=1e-4, atol=1e-5)
        active = int((acts[..., feature] > 0).sum())
        assert len(set(zip(sampled.context_N, sampled.position_N, strict=True))) == min(SAMPLED, active)


def test_samples_are_drawn_from_all_active_tokens_alike(finished):
    contexts = [
        context
        for seed in range(12)
        for found in [measure(finished, FeaturesConfig(contexts=2, tokens=4, seed=seed))]
        for feature in range(128)
        for context in found.excerpts("sampled", feature).context_N
    ]
    share = np.bincount(contexts, minlength=32) / len(contexts)
    active = measure(finished)["active"].sum()
    assert active > 12 * SAMPLED * 128 / 12 and share.min() > 0.5 / 32 and share.max() < 2 / 32
    again = measure(finished, batch_rows=512)
    first = measure(finished)
    assert all(np.array_equal(first[name], again[name]) for name in ("sampled_context", "strongest_position", "active"))


def test_tokens_are_counted_inside_and_outside(looked_at):
    found, acts, tokens, _ = looked_at
    for feature in range(acts.shape[2]):
        values = acts[..., feature]
        ids, counts = np.unique(tokens[values > 0], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:32]
        used = found["token_active"][feature] > 0
        assert found["token"][feature][used].tolist() == ids[order].tolist()
        assert found["token_active"][feature][used].tolist() == counts[order].tolist()
        for token, rows, total in zip(
            *(found[name][feature][used] for name in ("token", "token_rows", "token_sum")), strict=True
        ):
            here = (tokens == token) & (values != LEFT_OUT)
            assert rows == here.sum()
            assert total == pytest.approx(values[here].sum(), rel=1e-4, abs=1e-5)
        assert found["token_total"][feature] == counts.sum()


def test_fewer_excerpts_are_kept_where_the_bound_is_low(finished, tmp_path, capsys):
    whole = measure(finished, CONFIG.model_copy(update={"tokens": 8}))
    size = 400_000
    bounded = measure(finished, FeaturesConfig(contexts=2, tokens=8, activity_bytes=size))
    assert "evaluate.features.activity_bytes: 4 strongest and 51 drawn excerpts" in capsys.readouterr().out
    write_activity(tmp_path / "a", bounded)
    assert (tmp_path / "a").stat().st_size < size
    for name in ("active", "max", "token_active"):
        assert np.array_equal(bounded[name], whole[name])
    for feature in range(128):
        few, many = (each.excerpts("strongest", feature) for each in (bounded, whole))
        assert np.array_equal(few.acts_NT, many.acts_NT[: len(few.acts_NT)])
    with pytest.raises(UserError, match=r"activity_bytes: 1,000: 128 features need at least"):
        measure(finished, FeaturesConfig(activity_bytes=1000))


def test_the_bound_holds_where_features_fire_at_every_token(finished, tmp_path):
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    tokens = contexts.read("holdout", "tokens", 0, contexts.count("holdout"))
    config = FeaturesConfig(contexts=2, tokens=11, activity_bytes=400_000)
    sums = ActivitySums(128, tokens, (["all"], np.zeros(len(tokens), np.int64)), 16, config)
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    for rows in stored_rows(store, "holdout", {HOOK: Exclusion(ExcludeConfig())}, 512, contexts=contexts):
        sums.add(Encoded(rows, rows.acts[HOOK].float(), torch.rand(rows.size, 128) + 0.1))
    write_activity(tmp_path / "a", sums.result())
    fits = room(128, 1, tokens.shape, config)
    assert fits.bytes <= 400_000 < fits.bytes + 128 * (8 + 4 * 11 + 2)
    header = 8 + int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert (tmp_path / "a").stat().st_size - header == fits.bytes


def test_dense_features_take_their_excerpts_from_a_part_of_the_contexts(finished, monkeypatch):
    whole = measure(finished)
    monkeypatch.setattr(activity_sums, "NONZEROS", int(whole["active"].sum()) // 8)  # a quarter of each of two shards
    monkeypatch.setattr(activity_sums, "PAIRS", 128)
    found = measure(finished)
    assert all(np.array_equal(found[name], whole[name]) for name in ("active", "sum", "max", "histogram"))
    used = found["strongest_context"][found["strongest_context"] >= 0]
    assert len(np.unique(used)) in range(4, 12) and (used % 16).max() < 6
    assert (found["token_total"] < whole["token_total"]).all()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(UserError, match=f"{name}: missing or damaged"):
            read_activity(tmp_path / name)


def test_the_same_activity_is_the_same_bytes(finished, tmp_path):
    found = measure(finished)
    for n in range(8):  # safetensors writes several keys of metadata in an order of chance
        write_activity(tmp_path / str(n), found)
    assert len({(tmp_path / str(n)).read_bytes() for n in range(8)}) == 1
