"""Weights of linear layers in the order in which a CPU's kernels read them, made once.

torch makes that order anew for every product, which takes half of the time where few rows are multiplied. Layers that
read the same (queries, keys and values; gate and up) are one product. In bfloat16 the kernel is the same, and so is
every bit; in float32 it is oneDNN's in place of MKL's. Costs the memory of these weights once more, so a large model
is left as it is.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harvest.products import widens

HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14  # bytes; Linux's number
LARGEST = 8e9  # bytes of weights that are packed
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as transformers names layers of one input

Product = Callable[[Tensor], Tensor]


class PackedWeights:
    """The packed weights of a model on a CPU; of none elsewhere."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.forwards: dict[Any, Product] = {}
        self.joined: dict[tuple[Any, ...], Product] = {}
        self.steps: dict[tuple[str, int], Any] = {}  # evaluate/layer_step.py's, by hook and number of slots
        if device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        linear: list[Any] = [module for module in model.modules() if _packs(module, device)]
        size = sum(module.weight.nbytes for module in linear)
        if size > LARGEST:
            return
        _ask_for_huge_pages(size)
        for layers in _siblings(model, set(linear)):
            self.joined[layers] = _packed(layers)
            self.forwards |= _parts(layers, self.joined[layers])
        self.forwards |= {layer: _packed([layer]) for layer in linear if layer not in self.forwards}

    def product(self, layers: Sequence[Any]) -> Product:
        """What layers give of one input, side by side: (..., d_in) to (..., the sum of their widths)."""
        if tuple(layers) in self.joined:
            return self.joined[tuple(layers)]
        each: list[Product] = [self.forwards.get(layer) or layer.forward for layer in layers]
        return each[0] if len(each) == 1 else lambda x: torch.cat([forward(x) for forward in each], -1)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within this, the model multiplies by the packed weights."""
        try:
            for module, forward in self.forwards.items():
                vars(module)["forward"] = forward
            yield
        finally:
            for module in self.forwards:
                vars(module).pop("forward", None)


def _ask_for_huge_pages(size: int) -> None:
    """Have Linux back the next memory of this size by pages of 2 MB, where freed memory is kept (`set_up`).

    A step reads each weight once, which over pages of 4 kB takes a fifth longer.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    room = torch.empty(size + 2 * HUGE_PAGE, dtype=torch.uint8)
    start = -(-room.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    if advise and sys.platform == "linux":
        advise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)


def _packs(module: Any, device: torch.device) -> bool:
    if type(module) is not nn.Linear or widens(device, module.weight.dtype):
        return False
    return module.weight.dtype in (torch.bfloat16, torch.float32)


def _siblings(model: nn.Module, linear: set[Any]) -> Iterator[tuple[Any, ...]]:
    for module in model.modules():
        for names in SIBLINGS:
            layers: tuple[Any, ...] = tuple(getattr(module, name, None) for name in names)
            if linear.issuperset(layers) and len({(each.weight.dtype, each.bias is None) for each in layers}) == 1:
                yield layers


def _packed(layers: Sequence[Any]) -> Product:
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
    dtype = weights[0].dtype
    bias = None if biases[0] is None else torch.cat(biases)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype:
            return nn.functional.linear(x, torch.cat(weights), bias)
        return multiply(x, packed, bias, "none", [], "")

    return forward


def _parts(layers: Sequence[Any], joined: Product) -> dict[Any, Product]:
    """Each layer's own part of a product, which the first of them that sees an input computes for all."""
    widths = [layer.out_features for layer in layers]
    last: tuple[Any, Sequence[Tensor]] = None, ()

    def part(number: int, x: Tensor) -> Tensor:
        nonlocal last
        if last[0] is not x:
            last = x, joined(x).split(widths, -1)
        found = last[1][number]
        if number == len(layers) - 1:
            last = None, ()  # the input may be changed in place from here on
        return found

    return {layer: partial(part, number) for number, layer in enumerate(layers)}
