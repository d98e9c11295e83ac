"""Memory of the harvest and of training, by arithmetic: what is allocated at the moment when most is.

It counts tensors, not what the allocator keeps beside them, nor the CUDA context (half a GB). benchmarks/results.md
holds it against measured peaks.

B rows of a batch, D d_in, F d_sae, N active entries of a batch.
"""

from typing import NamedTuple

from pipeline.measure import Machine
from pipeline.sizes import Sizes
from train.config import TrainConfig
from train.dense_step import CPU_BLOCK, CUDA_BLOCK
from train.kinds import sae_class
from train.matryoshka import SHARES
from train.step import AUTOGRAD

AUTOGRAD_BYTES = 13  # for each of B × F in a step, as measured for the standard SAE under autocast
HELD_BYTES, SORTED_BYTES = 28, 44  # for each of N: beside the gradients, and before they are made, while N is sorted
ELEMENT = {"float32": 4, "bfloat16": 2}


class HarvestMemory(NamedTuple):
    """Bytes, unless said otherwise."""

    fixed: int  # the layers up to the hook, and two shards of every hook
    context: int  # of one context of a batch

    def of(self, batch_contexts: int) -> int:
        """Bytes with batches of so many contexts."""
        return self.fixed + batch_contexts * self.context

    def largest(self, shard_contexts: int, room: float) -> int:
        """The largest batch, in contexts, that divides a shard and fits; 0 if none does."""
        fits = (k for k in range(1, shard_contexts + 1) if shard_contexts % k == 0)
        return max((k for k in fits if self.of(k) <= room), default=0)


def harvest_memory(s: Sizes, machine: Machine) -> HarvestMemory:
    """What the harvest takes on the device."""
    shards = 2 * len(s.geometry.hooks) * s.geometry.shard_rows * (2 * s.geometry.d_in + 4)  # rows and their norms
    return HarvestMemory(s.parameters * machine.element + shards, s.context * machine.element // 4)


def pinned_pools(config: TrainConfig, s: Sizes, machine: Machine) -> int:
    """Bytes of host memory for pools of rows: two; three with a GPU, as one that was used stays in torch's cache of
    pinned memory, in which every block is rounded up to a power of two."""
    pool = 2 * s.geometry.d_in * config.pool_rows
    return 3 * (1 << (pool - 1).bit_length()) if machine.is_gpu else 2 * pool


def training_memory(config: TrainConfig, s: Sizes, machine: Machine) -> int:
    """What training takes on the device: SAEs, the gradients of one of them, held-out rows, and the larger of what a
    step makes of a batch and what a look at held-out rows does."""
    element = ELEMENT.get(config.compute_dtype, machine.element)
    # Float32 weights and two moments, and copies in the products' precision.
    each = s.sae // 4 * (12 + (element if element < 4 else 0))
    held_out = 2 * s.geometry.d_in * config.validation_rows
    kernels = vars(sae_class(config.sae.kind)).get("kernels", {})  # as train.step.kernels
    by_autograd = kernels.get("dense", AUTOGRAD) is AUTOGRAD
    dense_first = "sparse" not in kernels or config.kernel == "dense" or (config.kernel == "auto" and not by_autograd)
    working = []
    if dense_first:
        working.append(_autograd(config, s) if by_autograd else _dense(config, s, machine, element))
    if "sparse" in kernels and config.kernel != "dense":
        working.append(_sparse(config, s, element, from_the_start=not dense_first))
    return s.saes * each + s.sae + held_out + max(working)


def _autograd(config: TrainConfig, s: Sizes) -> int:
    return AUTOGRAD_BYTES * config.batch_size * s.d_sae


def _dense(config: TrainConfig, s: Sizes, machine: Machine, element: int) -> int:
    B, D, F = config.batch_size, s.geometry.d_in, s.d_sae
    block = min(CUDA_BLOCK if machine.is_gpu else CPU_BLOCK, F)
    # Features; of a block df in two precisions, dW_enc, and dW_dec of the block before.
    step = _rows(B, D, element) + element * B * F + block * (B * (4 + element) + 8 * D)
    # A look keeps features in float32 and in the products' precision; the last step's gradients are still there.
    look = 12 * B * D + (4 + element) * B * F
    return max(step, look)


def _sparse(config: TrainConfig, s: Sizes, element: int, *, from_the_start: bool) -> int:
    B, D, F, sae = config.batch_size, s.geometry.d_in, s.d_sae, config.sae
    if sae.k:
        active = 2 * sae.k * B  # candidates
    elif from_the_start:
        active = B * F // 2  # of random weights half of the features fire
    else:
        active = int(config.sparse_below * F * B)  # when it goes sparse
    # Figures take two float32 tensors of rows, dead features three more; or nested prefixes four each.
    prefixes = len(sae.prefixes or SHARES) if sae.kind == "matryoshka" else 0
    temporary = 4 * B * D * max(2 + (3 if sae.aux_coefficient else 0), 4 * prefixes)
    step = _rows(B, D, element) + max(temporary, HELD_BYTES * active)
    sorting = SORTED_BYTES * active - s.sae  # gradients come after it
    look = 16 * B * D + element * B * F  # pre-activations
    return max(step, sorting, look)


def _rows(B: int, D: int, element: int) -> int:
    """Of a batch: as stored, and scaled rows and errors in float32 and in the products' precision."""
    return B * D * (2 + 2 * (4 + element))
