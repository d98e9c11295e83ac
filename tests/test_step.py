"""Each step against SAELens' standard SAE: same tensors, same settings, same loss and gradients."""

from collections.abc import Callable

import pytest
import torch

from train.dense_step import dense_step
from train.sparse_step import sparse_step
from train.standard import Standard
from train.step import StepResult, autograd_step, total

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: nothing to compare with")


@pytest.mark.parametrize("step", [autograd_step, dense_step, sparse_step])
def test_loss_and_gradients_equal_saelens(step: Callable[..., StepResult]) -> None:
    from sae_lens.saes.sae import TrainStepInput

    sae = Standard.initial(48, 200, seed=3)
    generator = torch.Generator().manual_seed(4)
    x_BD = torch.randn(96, 48, generator=generator)
    sae.b_enc.normal_(-0.2, 0.1, generator=generator)
    sae.b_dec.normal_(0, 0.1, generator=generator)

    theirs = sae_lens.StandardTrainingSAE(
        sae_lens.StandardTrainingSAEConfig(
            d_in=48, d_sae=200, apply_b_dec_to_input=False, l1_coefficient=5.0, normalize_activations="none"
        )
    )
    theirs.load_state_dict(sae.parameters)
    output = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x_BD,
            coefficients={"l1": 5.0},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    ours = step(sae, x_BD, {"l1": 5.0}, torch.float32)

    torch.testing.assert_close(total(ours.terms, {"l1": 5.0}), output.loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.l0, (output.feature_acts > 0).float().sum(1).mean(), rtol=1e-6, atol=0)
    for name, gradient in ours.gradients.items():
        reference = getattr(theirs, name).grad
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name
