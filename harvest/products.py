"""Matrix products of bfloat16 on CPUs without such instructions, where torch emulates them at a fraction of the speed.

Elsewhere a product of bfloat16 is summed in float32 and rounded once. Here the operands are widened, which is exact,
multiplied in float32, and the result is rounded: the same up to the order of the sums.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harvest.device import has_bfloat16

PRODUCTS = {
    functional.linear,
    functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.mm,
    torch.addmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.mm,
}


class WidenedProducts(TorchFunctionMode):
    """Within this, products of bfloat16 are taken in float32 and rounded to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[
            int, tuple[nn.Parameter, Tensor]
        ] = {}  # by identity; the parameter is kept, so it is its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function; those of `PRODUCTS` with every bfloat16 operand widened."""
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if func not in PRODUCTS or not any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in given):
            return func(*args, **kwargs)
        out = func(*map(self._wide, args), **{name: self._wide(value) for name, value in kwargs.items()})
        return out.bfloat16()

    def _wide(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.bfloat16:
            return value
        if not isinstance(value, nn.Parameter):
            return value.float()
        if id(value) not in self._weights:
            self._weights[id(value)] = (value, value.detach().float())
        return self._weights[id(value)][1]


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's products in `dtype` are widened on this device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16(device)


def with_widened_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward pass, its products taken in float32; the widened weights take 4 bytes a parameter more."""
    mode = WidenedProducts()

    @wraps(forward)
    def widened(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return widened
