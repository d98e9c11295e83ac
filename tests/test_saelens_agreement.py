"""Our figures against SAELens' own evals of the exported SAE, on the same real tokens."""

from contextlib import chdir
from typing import Any, cast

import numpy as np
import pytest
import real
import torch
from conftest import only, pipeline
from made_rows import batches
from made_rows import measured as measured_alone

from evaluate.downstream import downstream
from harvest.config import ModelConfig
from harvest.contexts import Contexts
from harvest.language_model import load_model
from train.checkpoint import load_sae
from train.config import ExcludeConfig

CONTEXTS, LENGTH = 2, 32
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
def measured(real_run, tmp_path_factory):
    """Ours, and SAELens' figures of the exported SAE and of one whose scale is not folded in: real tokens, all rows."""
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("export") / "sae"
    with chdir(real_run):
        assert pipeline("export", *real.SETTINGS, "--to", str(folder), config=real.CONFIG).status == 0
    saved = load_sae(only(real_run, f"runs/train/*/{real.HOOK}"))
    contexts = Contexts(only(real_run, "runs/sample/*/contexts"))
    tokens = contexts.read("holdout", "tokens", 0, CONTEXTS)[:, :LENGTH]
    ids = torch.from_numpy(tokens.astype(np.int64))
    name = str(real_run / "assets/smollm2-135m")
    model = load_model(ModelConfig(name=name), None, [real.HOOK], torch.float32, torch.device("cpu"), with_head=True)
    # Ours are rounded as the store holds them, SAELens' are not: here the model itself rounds them, for both.
    model.modules[real.HOOK].register_forward_hook(lambda _module, _inputs, output: output.bfloat16().float())
    rows = model.activations(ids)[real.HOOK].bfloat16()
    context = np.repeat(np.arange(CONTEXTS), tokens.shape[1])
    ours = measured_alone(saved, batches(rows.flatten(0, 1), context), {})
    figures = dict(ours.figures["all_rows"]["all"])
    figures |= downstream(model, saved, ExcludeConfig(), ours.mean_D, tokens, {}, CONTEXTS)["all"]

    proxy = HookedProxyLM(model.model, AutoTokenizer.from_pretrained(name), hook_names=[real.HOOK])
    theirs = SAE.load_from_disk(folder / "blocks.2.hook_resid_post")

    def theirs_measured(*parts: str) -> dict[str, float]:
        config = EvalConfig(
            CONTEXTS, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, **dict.fromkeys(parts, True)
        )
        scaler = ActivationScaler()
        metrics, _ = run_evals(theirs, cast(Any, Tokens(ids)), proxy, scaler, config, exclude_special_tokens=False)
        return {name: value for group in metrics.values() for name, value in group.items()}

    of_rows = ("compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics")
    as_exported = theirs_measured(*of_rows, "compute_kl", "compute_ce_loss")
    theirs.load_state_dict(saved.sae.parameters)
    return figures, as_exported, theirs_measured(*of_rows)


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
def test_figures_agree_with_saelens(measured, ours, saelens):
    figures, theirs, _ = measured
    assert figures[ours] == pytest.approx(theirs[saelens], rel=RELATIVE)
    assert figures[ours] != 0


@pytest.mark.parametrize(
    ("ours", "saelens"), [(n, n) for n in ("l0", "mse", "explained_variance_legacy")] + [("norm_ratio", "l2_ratio")]
)
def test_without_the_fold_figures_differ(measured, ours, saelens):
    """By little: ReLU(s·x) = s·ReLU(x), so only the biases meet rows of another scale."""
    figures, _, unfolded = measured
    assert figures[ours] != pytest.approx(unfolded[saelens], rel=RELATIVE)
