"""Memory for one shard's rows on their way from the forward pass to the store.

Each batch's rows go straight to their stored place, with their norms, on the device. When the shard is whole it
is copied to pinned host memory on a stream of its own, beside the next forward pass. The host waits for the
device once a shard, in the thread that writes. A CPU has no copy: the rows lie where the writer reads them.

Costs shard_rows × d_in × 2 bytes a hook on the device and, with a GPU, as much again in pinned host memory.

Shape suffixes: R rows of a shard, N those of a batch, C contexts of a shard, B those of a batch, S positions, D d_in.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.activation_store import SPLITS, Geometry, ShardRows
from harvest.files import UserError
from harvest.workers import Shard


class HookRows(NamedTuple):
    """A shard's rows at one hook, in stored order."""

    acts_RD: Tensor  # bfloat16
    norms_R: Tensor  # float32, of the stored rows


class ShardBuffer:
    """Room for one shard at a time: `start`, `put` every batch, `copy_to_host`; then `rows`, from any thread."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.geometry, self.device = geometry, device
        self._on_device = self._on_host = self._allocated(device, pinned=False)
        if device.type == "cuda":
            self._on_host = self._allocated(torch.device("cpu"), pinned=True)
            self._stream, self._copied = torch.cuda.Stream(device), torch.cuda.Event()

    def _allocated(self, device: torch.device, pinned: bool) -> dict[str, HookRows]:
        rows, d_in = self.geometry.shard_rows, self.geometry.d_in
        return {
            hook: HookRows(
                torch.empty(rows, d_in, dtype=torch.bfloat16, device=device, pin_memory=pinned),
                torch.empty(rows, device=device, pin_memory=pinned),
            )
            for hook in self.geometry.hooks
        }

    def start(self, shard: Shard, tokens_CS: np.ndarray, seed: int) -> Tensor:
        """Take up a shard; the tokens of its contexts, int64 (shard_contexts, context_size), on the device."""
        generator = np.random.default_rng([seed, SPLITS.index(shard.split), shard.number])
        self._shard, self._tokens_CS = shard, tokens_CS
        self._order = generator.permutation(self.geometry.shard_rows)
        self._places = self._sent(torch.from_numpy(np.argsort(self._order)))
        return self._sent(torch.from_numpy(tokens_CS.astype(np.int64)))

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def put(self, first_context: int, hook: str, acts_BSD: Tensor) -> None:
        """Keep the activations of a batch of contexts, counted within the shard."""
        rows_ND = acts_BSD.flatten(0, 1).bfloat16()
        first = first_context * self.geometry.context_size
        places_N = self._places[first : first + len(rows_ND)]
        acts_RD, norms_R = self._on_device[hook]
        acts_RD[places_N] = rows_ND
        norms_R[places_N] = rows_ND.float().norm(dim=1)

    def copy_to_host(self) -> None:
        """Queue the copy; call it when every batch was put."""
        if self.device.type == "cuda":
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for hook, rows in self._on_device.items():
                    for target, source in zip(self._on_host[hook], rows, strict=True):
                        target.copy_(source, non_blocking=True)
                self._copied.record()

    def rows(self) -> ShardRows:
        """The whole shard, in memory that the next `start` gives to others; waits for the copy.

        Raises UserError for a NaN or infinity, with its context and hook.
        """
        if self.device.type == "cuda":
            self._copied.synchronize()
        g, shard = self.geometry, self._shard
        in_shard, position = np.divmod(self._order, g.context_size)
        context = shard.number * g.shard_contexts + in_shard
        norms = {hook: rows.norms_R.numpy() for hook, rows in self._on_host.items()}
        for hook, of_rows in norms.items():
            if not np.isfinite(of_rows).all():
                raise UserError(
                    f"harvest.hooks: {hook!r}: NaN or infinity in the activations of {shard.split} context "
                    f"{context[~np.isfinite(of_rows)].min()}; nothing of this shard was written. Try "
                    "harvest.compute_dtype=float32, or look at that context"
                )
        acts = {hook: rows.acts_RD.view(torch.uint16).numpy() for hook, rows in self._on_host.items()}
        token_id = self._tokens_CS.reshape(-1)[self._order]
        return ShardRows(acts, norms, token_id, context.astype(np.uint32), position.astype(np.uint16))
