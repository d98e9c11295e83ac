"""Feature pages whose tokens are text that tries to break them."""

from pathlib import Path

import numpy as np
import torch
from conftest import only

from evaluate.config import FeaturesConfig
from evaluate.feature_views import Scored, Site
from evaluate.features import activity, heldout_activity, nearest_features
from evaluate.unembedding import Tokens
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from train.checkpoint import load_sae
from train.config import ExcludeConfig

HOOK = "model.layers.1"
CONFIG = FeaturesConfig(contexts=4, tokens=16)
TOKENS = (
    "</script><script>window.broken=1</script>",
    '<img src=x onerror="window.broken=1">',
    '" onmouseover="window.broken=1',
    "\u202eevil\u2066\u200f",
    "\x00\x1b[31m\x7f",
    "w" * 5000,
    "\u0301" * 30,
    "שלום",
    " ",
    "\n\n",
    "{{ 7 * 7 }}",
    "&amp;<!--",
)


def text(token: int) -> str:
    return TOKENS[token] if token < len(TOKENS) else f" tok{token}"


def site(finished: Path, features: int = 12) -> Site:
    """The first features of the finished run; every second token hostile, in the contexts and among the promoted."""
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    source = contexts.read("holdout", "source", 0, contexts.count("holdout"))
    chosen = np.arange(features)
    shards = heldout_activity(store, saved, ExcludeConfig(positions=(0,)), source, chosen)
    shards = (
        shard._replace(token_CS=np.where(shard.token_CS % 2, shard.token_CS, shard.token_CS % len(TOKENS)))
        for shard in shards
    )
    listed = torch.arange(10).repeat(features, 1)
    tokens = Tokens(listed, torch.linspace(3, 1, 10).repeat(features, 1))
    rng = np.random.default_rng(0)
    scored = Scored(rng.normal(size=128), rng.random((2, 128)), ["wait", "<b>let me</b>"])
    return Site(
        HOOK,
        128,
        chosen,
        activity(shards, features, 2, CONFIG),
        contexts.sources,
        text,
        (tokens, Tokens(listed + 50, -tokens.logit_KN)),
        "",
        nearest_features(saved.sae.W_dec, chosen),
        scored,
    )
