"""Rows by batches, against a plain look at the store and at the model."""

import numpy as np
import pytest
import torch
from conftest import only, pipeline
from transformers import AutoModelForCausalLM

from harvest.activation_rows import model_rows, stored_rows, together
from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.contexts import NO_STRATUM, Contexts
from harvest.files import UserError
from harvest.language_model import load_model
from train.config import ExcludeConfig
from train.exclusion import Exclusion, kept_rows

HOOKS = ("model.layers.0", "model.layers.1")
SETTING = "harvest.hooks=[model.layers.0,model.layers.1]"


@pytest.fixture(scope="module")
def harvested(finished, tmp_path_factory):
    """(store of two hooks, its contexts, the model and its folder)"""
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "assets").symlink_to(finished / "assets")
        assert pipeline("sample", SETTING).status == pipeline("harvest", SETTING).status == 0
    contexts = Contexts(only(folder, "runs/sample/*/contexts"))
    config = ModelConfig(name=str(folder / "assets/tiny-llama"))
    model = load_model(config, None, list(HOOKS), torch.bfloat16, torch.device("cpu"))
    return ActivationStore.open(only(folder, "runs/harvest/*/store")), contexts, model, config.name


def plain(store, name, hook=None):
    """A whole split as it is stored, by shard."""
    g = store.geometry
    if name != "acts":
        return np.concatenate([store.read_provenance("train", name, s) for s in range(g.train_shards)])
    chunks = [store.read_chunk("train", hook, c) for c in range(g.train_shards * g.chunks_per_shard)]
    return np.concatenate(chunks)


@pytest.mark.parametrize("reading_order", [False, True])
def test_batches_are_the_rows_of_both_hooks_and_where_they_come_from(harvested, reading_order):
    store, contexts, *_ = harvested
    exclude = ExcludeConfig(positions=(3,), token_ids=(30,))
    limits = [float(np.quantile(store.read_norms("train", hook, 0), 0.7)) for hook in HOOKS]
    rules = {hook: Exclusion(exclude, limit) for hook, limit in zip(HOOKS, limits, strict=True)}
    found = list(stored_rows(store, "train", rules, 100, contexts=contexts, reading_order=reading_order))
    assert [batch.size for batch in found] == [100] * 15 + [36]
    context, position = plain(store, "context"), plain(store, "position")
    order = np.lexsort((position, context)) if reading_order else np.arange(len(context))
    joined = {name: np.concatenate([getattr(b, name) for b in found]) for name in ("token", "context", "position")}
    for name, array in (("token", "token_id"), ("context", "context"), ("position", "position")):
        assert np.array_equal(joined[name], plain(store, array)[order])
    for hook in HOOKS:
        acts = torch.cat([b.acts[hook] for b in found]).view(torch.uint16).numpy()
        assert np.array_equal(acts, plain(store, "acts", hook)[order])
    assert not torch.equal(found[0].acts[HOOKS[0]], found[0].acts[HOOKS[1]])
    kept = [
        np.concatenate([kept_rows(store, "train", hook, s, exclude, limit) for s in range(6)])
        for hook, limit in zip(HOOKS, limits, strict=True)
    ]
    both = np.concatenate([b.kept for b in found])
    assert np.array_equal(both, (kept[0] & kept[1])[order]) and 0.2 < both.mean() < 0.8
    assert not np.array_equal(kept[0], kept[1])
    source = contexts.read("train", "source", 0, contexts.count("train"))
    assert np.array_equal(np.concatenate([b.source for b in found]), source[joined["context"]])
    assert (found[0].stratum == NO_STRATUM).all()


def test_some_shards(harvested):
    store, contexts, *_ = harvested
    rules = {HOOKS[0]: Exclusion(ExcludeConfig())}
    (batch,) = stored_rows(store, "train", rules, 1000, contexts=contexts, shards=[2, 4])
    assert set(batch.context // 16) == {2, 4} and batch.size == 512 and batch.kept.all()


def test_rows_of_a_forward_pass_are_those_of_transformers(harvested):
    _, contexts, model, folder = harvested
    numbers = np.array([1, 4, 5, 9])
    exclude = ExcludeConfig(positions=(0,))
    tokens = contexts.read("train", "tokens", 0, 10)[numbers]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = whole(torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True).hidden_states[1]
    limit = float(expected.float().norm(dim=2).median())
    rules = {HOOKS[0]: Exclusion(exclude, limit)}
    first, second = model_rows(model, contexts, "train", rules, numbers, 3)
    assert (first.size, second.size) == (48, 16)
    assert torch.allclose(torch.cat([first.acts[HOOKS[0]], second.acts[HOOKS[0]]]), expected.flatten(0, 1), atol=1e-2)
    assert np.array_equal(np.unique(first.context), numbers[:3]) and second.context.tolist() == [9] * 16
    assert np.array_equal(first.token, tokens[:3].reshape(-1))
    assert np.array_equal(first.position, np.tile(np.arange(16), 3))
    norm = first.acts[HOOKS[0]].float().norm(dim=1).numpy()
    assert np.array_equal(first.kept, (norm <= limit) & (first.position > 0)) and 0.2 < first.kept.mean() < 0.8
    assert set(first.source) == set(contexts.read("train", "source", 0, 10)[numbers[:3]])


def test_two_harvests_are_read_as_one(harvested):
    store, contexts, *_ = harvested
    sides = [
        stored_rows(store, "train", {hook: Exclusion(ExcludeConfig(positions=(position,)))}, 64, contexts=contexts)
        for position, hook in enumerate(HOOKS)
    ]
    for a, b in together(*sides):
        assert np.array_equal(a.kept, b.kept) and np.array_equal(a.kept, a.position > 1)
        assert list(a.acts) == [HOOKS[0]] and list(b.acts) == [HOOKS[1]]
    rules = {HOOKS[0]: Exclusion(ExcludeConfig())}
    other = stored_rows(store, "holdout", rules, 64, contexts=contexts)
    with pytest.raises(UserError, match="not of the same tokens"):
        list(together(stored_rows(store, "train", rules, 64, shards=[0, 1]), other))


def test_rows_of_another_text_are_refused(harvested, finished, tmp_path, monkeypatch):
    store, *_ = harvested
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(finished / "assets")
    assert pipeline("sample", "sample.seed=1").status == 0
    contexts = Contexts(only(tmp_path, "runs/sample/*/contexts"))
    with pytest.raises(UserError, match=r"its train shard 0 was not made from .*contexts"):
        next(stored_rows(store, "train", {HOOKS[0]: Exclusion(ExcludeConfig())}, 64, contexts=contexts))
