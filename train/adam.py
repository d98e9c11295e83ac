"""Adam over float32 weights (Kingma and Ba, arXiv 1412.6980) that clips, and writes the products' operands, as it goes.

The update divides gradients by a number on the device while it reads them, so clipping is no pass of its own;
where products run in bfloat16, the update writes those copies of W_enc and W_dec too. On CUDA all of it is one
Triton kernel a tensor (`train.kernels.adam_update`), elsewhere torch's fused Adam and a copy.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from train.sae import SAE


class Update(NamedTuple):
    """Numbers of one update."""

    lr: float
    betas: tuple[float, float]
    step: int  # from 1
    divisor: Tensor  # 0-d float32 on the device; where it is not finite, nothing changes
    eps: float = 1e-8


class Adam:
    """The moments of an SAE's weights, and `operands`: the weights as the products take them."""

    def __init__(self, sae: SAE, compute_dtype: torch.dtype) -> None:
        self.sae = self.operands = sae
        self.exp_avg = SAE(*map(torch.zeros_like, sae))
        self.exp_avg_sq = SAE(*map(torch.zeros_like, sae))
        if compute_dtype != torch.float32:
            self.operands = sae._replace(W_enc=sae.W_enc.to(compute_dtype), W_dec=sae.W_dec.to(compute_dtype))

    def update(self, gradients: SAE, numbers: Update) -> None:
        """Change weights, moments and operands in place; gradients may be overwritten."""
        apply = plain_update
        if numbers.divisor.is_cuda:
            from train.kernels import adam_update as apply
        apply(self.sae, gradients, self.exp_avg, self.exp_avg_sq, self.operands, numbers)

    def weights_changed(self) -> None:
        """Make the operands anew, after the weights were written from outside."""
        copy_operands(self.sae, self.operands)


def plain_update(sae: SAE, gradients: SAE, exp_avg: SAE, exp_avg_sq: SAE, operands: SAE, numbers: Update) -> None:
    """The update in torch, whose fused Adam takes a loss scale to divide by and a flag to leave all as it is."""
    steps = [torch.tensor(float(numbers.step - 1), device=weight.device) for weight in sae]
    adam(
        list(sae), list(gradients), list(exp_avg), list(exp_avg_sq), [], steps,
        fused=True, grad_scale=numbers.divisor, found_inf=torch.isfinite(numbers.divisor).logical_not().float(),
        lr=numbers.lr, beta1=numbers.betas[0], beta2=numbers.betas[1], eps=numbers.eps,
        amsgrad=False, weight_decay=0.0, maximize=False,
    )  # fmt: skip
    copy_operands(sae, operands)


def copy_operands(sae: SAE, operands: SAE) -> None:
    """Write the weights into those operands that are tensors of their own."""
    for weight, operand in zip(sae, operands, strict=True):
        if operand is not weight:
            operand.copy_(weight)
