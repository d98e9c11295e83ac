"""Our figures against SAELens' own evals, on the same tokens and the same weights."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import only

from evaluate.downstream import downstream
from evaluate.fidelity import HeldoutBatch, fidelity
from harvest.config import ModelConfig
from harvest.language_model import load_model
from harvest.sampling import Contexts
from train.checkpoint import load_sae
from train.config import ExcludeConfig

HOOK = "model.layers.1"
CONTEXTS = 16
RELATIVE = 1e-3


class Tokens:
    """What SAELens' evals ask of its ActivationsStore: whole batches of tokens, in order."""

    store_batch_size_prompts = CONTEXTS

    def __init__(self, tokens):
        self.tokens, self.context_size = tokens, tokens.shape[1]

    def get_batch_tokens(self, batch_size):
        assert batch_size == len(self.tokens)
        return self.tokens

    def reset_input_dataset(self):
        pass


@pytest.fixture(scope="module")
def evaluated(finished):
    """Ours and SAELens' figures of the tiny run's SAE on its first held-out contexts, every row through the SAE."""
    from sae_lens import SAE, StandardSAEConfig
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformers import AutoTokenizer

    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    contexts = Contexts(only(finished, "runs/sample/*/contexts"))
    tokens = contexts.read("holdout", "tokens", 0, CONTEXTS)
    ids = torch.from_numpy(tokens.astype(np.int64))
    name = str(finished / "assets/tiny-llama")
    model = load_model(ModelConfig(name=name), None, [HOOK], torch.float32, torch.device("cpu"), with_head=True)
    # Ours are rounded as the store holds them, SAELens' are not: well within the tolerance.
    rows = model.activations(ids)[HOOK].bfloat16()
    sources = np.zeros(CONTEXTS, np.uint8)
    context = np.repeat(np.arange(CONTEXTS), tokens.shape[1])
    batch = HeldoutBatch(rows.flatten(0, 1), np.ones(len(context), bool), context)
    ours = fidelity(saved, iter([batch]), ["text"], sources, torch.device("cpu"))
    figures = dict(ours.figures["all_rows"]["all"])
    figures |= downstream(model, saved, ExcludeConfig(), ours.mean_D, tokens, sources, ["text"], CONTEXTS)["all"]

    metadata = SAEMetadata(hook_name=HOOK, hook_head_index=None)
    theirs = SAE.from_dict(
        StandardSAEConfig(
            d_in=saved.sae.d_in, d_sae=saved.sae.d_sae, apply_b_dec_to_input=False, metadata=metadata
        ).to_dict()
    )
    scale = saved.statistics.scale
    folded = {"W_enc": saved.sae.W_enc * scale, "b_enc": saved.sae.b_enc}
    folded |= {"W_dec": saved.sae.W_dec / scale, "b_dec": saved.sae.b_dec / scale}
    theirs.load_state_dict(folded)
    proxy = HookedProxyLM(model.model, AutoTokenizer.from_pretrained(name), hook_names=[HOOK])
    config = EvalConfig(
        batch_size_prompts=CONTEXTS,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    metrics, _ = run_evals(
        theirs, cast(Any, Tokens(ids)), proxy, ActivationScaler(), config, exclude_special_tokens=False
    )
    return figures, {name: value for group in metrics.values() for name, value in group.items()}


@pytest.mark.parametrize(
    ("ours", "saelens"),
    [
        ("l0", "l0"),
        ("mse", "mse"),
        ("explained_variance", "explained_variance"),
        ("explained_variance_legacy", "explained_variance_legacy"),
        ("cosine", "cossim"),
        ("norm_ratio", "l2_ratio"),
        ("ce_clean", "ce_loss_without_sae"),
        ("ce_sae_all_rows", "ce_loss_with_sae"),
        ("ce_zero_ablated_all_rows", "ce_loss_with_ablation"),
        ("ce_loss_score_all_rows", "ce_loss_score"),
        ("kl_sae_all_rows", "kl_div_with_sae"),
    ],
)
def test_figures_agree_with_saelens(evaluated, ours, saelens):
    figures, theirs = evaluated
    assert figures[ours] == pytest.approx(theirs[saelens], rel=RELATIVE)
    assert figures[ours] != 0
