"""Weights of linear layers in the order in which a CPU's kernels read them, made once.

torch makes that order anew for every product, which takes half of the time where few rows are multiplied. In bfloat16
the kernel is the same, and so is every bit; in float32 it is oneDNN's in place of MKL's. Costs the memory of these
weights once more, so a large model is left as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harvest.products import widens

LARGEST = 8e9  # bytes of weights that are packed


class PackedWeights:
    """The packed weights of a model on a CPU; of none elsewhere."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.forwards: dict[Any, Callable[[Tensor], Tensor]] = {}
        if device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        linear = [module for module in model.modules() if type(module) is nn.Linear]
        if sum(module.weight.nbytes for module in linear) > LARGEST:
            return
        for module in linear:
            if forward := _packed(module, device):
                self.forwards[module] = forward

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within this, the model multiplies by the packed weights."""
        try:
            for module, forward in self.forwards.items():
                module.forward = forward
            yield
        finally:
            for module in self.forwards:
                vars(module).pop("forward", None)


def _packed(linear: nn.Linear, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    weight, bias, ops = linear.weight, linear.bias, torch.ops.mkldnn
    if weight.dtype not in (torch.bfloat16, torch.float32) or widens(device, weight.dtype):
        return None
    packed = ops._reorder_linear_weight(weight.detach())

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype:
            return nn.functional.linear(x, weight, bias)
        return ops._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
