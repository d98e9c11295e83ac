"""Adam over float32 weights (Kingma and Ba, arXiv 1412.6980) that clips, and writes the products' operands, as it goes.

The update divides gradients by a number on the device while it reads them, so clipping is no pass of its own;
where products run in bfloat16, the update writes those copies of W_enc and W_dec too. On CUDA (from Ampere on) all of
it is one Triton kernel a tensor (`train.kernels.adam_update`), elsewhere torch's fused Adam and a copy.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from harvest.device import is_ampere
from train.step import Tensors


class Update(NamedTuple):
    """Numbers of one update."""

    lr: float
    betas: tuple[float, float]
    step: int  # from 1
    divisor: Tensor  # 0-d float32 on the device; where it is not finite, nothing changes
    eps: float = 1e-8


class Adam:
    """The moments of some parameters, and `operands`: the parameters as the products take them, matrices in
    compute_dtype."""

    def __init__(
        self, parameters: dict[str, Tensor], compute_dtype: torch.dtype, rates: Mapping[str, float] | None = None
    ) -> None:
        """`parameters`: float32, of any shapes, changed in place; `rates` multiply the lr of some."""
        self.parameters, self.rates = parameters, dict(rates or {})
        self.exp_avg, self.exp_avg_sq = ({n: torch.zeros_like(w) for n, w in parameters.items()} for _ in range(2))
        self.operands = {
            n: weight.to(compute_dtype) if weight.dim() > 1 else weight for n, weight in parameters.items()
        }

    def update(self, gradients: Tensors, numbers: Update) -> None:
        """Change parameters, moments and operands in place; gradients, shapes as theirs, may be overwritten."""
        apply = plain_update
        if is_ampere(numbers.divisor.device):
            from train.kernels import adam_update as apply
        for rate in dict.fromkeys([1.0, *self.rates.values()]):
            names = [name for name in self.parameters if self.rates.get(name, 1.0) == rate]
            tensors = (self.parameters, gradients, self.exp_avg, self.exp_avg_sq, self.operands)
            weights, mine, mean, square, copies = ({name: each[name] for name in names} for each in tensors)
            apply(weights, mine, mean, square, copies, numbers._replace(lr=numbers.lr * rate))

    def weights_changed(self) -> None:
        """Make the operands anew, after the parameters were written from outside."""
        _copy_operands(self.parameters, self.operands)


def plain_update(
    parameters: Tensors, gradients: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, operands: Tensors, numbers: Update
) -> None:
    """The update in torch, whose fused Adam takes a loss scale to divide by and a flag to leave all as it is.

    All tensors of one name have one shape.
    """
    steps = [torch.tensor(float(numbers.step - 1), device=weight.device) for weight in parameters.values()]
    adam(
        list(parameters.values()), [gradients[name] for name in parameters], list(exp_avg.values()),
        list(exp_avg_sq.values()), [], steps,
        fused=True, grad_scale=numbers.divisor, found_inf=torch.isfinite(numbers.divisor).logical_not().float(),
        lr=numbers.lr, beta1=numbers.betas[0], beta2=numbers.betas[1], eps=numbers.eps,
        amsgrad=False, weight_decay=0.0, maximize=False,
    )  # fmt: skip
    _copy_operands(parameters, operands)


def _copy_operands(parameters: Tensors, operands: Tensors) -> None:
    for name, weight in parameters.items():
        if operands[name] is not weight:
            operands[name].copy_(weight)
