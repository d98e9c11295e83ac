"""Dense or sparse, step by step: by thresholds on the L0 of some steps before.

Both give the same gradients up to rounding, so the choice must not hang on timing: every run of the same
settings takes the same kernel at the same step, a resumed one too. The L0 is read LAG steps late, so that
the device never waits for it; two thresholds keep the choice from flickering.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.step import AUTOGRAD, Kernel

LAG = 8  # steps; the device is never as many behind
DENSE_AGAIN = 2.0  # times sparse_below
Pending = tuple[Tensor, torch.cuda.Event | None]


class KernelChoice:
    """Which of an SAE's kernels the next step takes. Starts dense: a standard SAE first fires half of its features."""

    def __init__(self, config: TrainConfig, d_sae: int, kernels: Mapping[str, Kernel]) -> None:
        self._fixed, self._below = config.kernel, config.sparse_below * d_sae
        if "sparse" not in kernels:
            self._fixed = next(iter(kernels))
        elif self._fixed == "auto" and kernels["dense"] is AUTOGRAD:
            self._fixed = "sparse"  # such kinds are sparse from the first step on
        self._sparse = False
        self._pending: deque[Pending] = deque()

    @property
    def name(self) -> str:
        """dense or sparse, for the next step."""
        return self._fixed if self._fixed != "auto" else "sparse" if self._sparse else "dense"

    def note(self, l0: Tensor) -> None:
        """Take the L0 (0-d) of the step just made; decide by the one of LAG steps before."""
        event = torch.cuda.Event() if l0.is_cuda else None
        value = torch.empty((), dtype=l0.dtype, pin_memory=l0.is_cuda).copy_(l0, non_blocking=True)
        if event:
            event.record()
        self._pending.append((value, event))
        if len(self._pending) > LAG:
            old = _wait(self._pending.popleft())
            self._sparse = old < self._below or (self._sparse and old <= DENSE_AGAIN * self._below)

    def state(self) -> dict[str, Any]:
        """What a resume needs, for JSON."""
        return {"sparse": self._sparse, "pending_l0": [_wait(entry) for entry in self._pending]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self._sparse = bool(state["sparse"])
        self._pending = deque((torch.tensor(l0, dtype=torch.float32), None) for l0 in state["pending_l0"])


def _wait(entry: Pending) -> float:
    if entry[1]:
        entry[1].synchronize()
    return float(entry[0])
