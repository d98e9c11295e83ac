"""Dense or sparse, step by step: by thresholds on the L0 of some steps before.

Both give the same gradients up to rounding, so the choice must not hang on timing: every run of the same
settings takes the same kernel at the same step, a resumed one too. The L0 is read LAG steps late, so that
the device never waits for it; two thresholds keep the choice from flickering.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig

LAG = 8  # steps; the device is never as many behind
DENSE_AGAIN = 2.0  # times sparse_below


class KernelChoice:
    """Which kernel the next step takes. Starts dense: an SAE's first L0 is half of its features."""

    def __init__(self, config: TrainConfig, d_sae: int) -> None:
        self._fixed = config.kernel
        self._below = config.sparse_below * d_sae
        self._sparse = False
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @property
    def sparse(self) -> bool:
        """Whether the next step takes the sparse kernel."""
        return self._sparse if self._fixed == "auto" else self._fixed == "sparse"

    def note(self, l0: Tensor) -> None:
        """Take the L0 (0-d) of the step just made; decide by the one of LAG steps before."""
        event = None
        if l0.is_cuda:
            value = torch.empty((), dtype=l0.dtype, pin_memory=True).copy_(l0, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            value = l0.clone()
        self._pending.append((value, event))
        if len(self._pending) > LAG:
            self._decide(self._wait(self._pending.popleft()))

    def _decide(self, l0: float) -> None:
        if l0 < self._below:
            self._sparse = True
        elif l0 > DENSE_AGAIN * self._below:
            self._sparse = False

    @staticmethod
    def _wait(entry: tuple[Tensor, torch.cuda.Event | None]) -> float:
        value, event = entry
        if event:
            event.synchronize()
        return float(value)

    def state(self) -> dict[str, Any]:
        """What a resume needs, for JSON."""
        return {"sparse": self._sparse, "pending_l0": [self._wait(entry) for entry in self._pending]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self._sparse = bool(state["sparse"])
        self._pending = deque((torch.tensor(l0, dtype=torch.float32), None) for l0 in state["pending_l0"])
