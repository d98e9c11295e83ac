"""One SAE trained by several processes: the features are split over ranks, b_dec is on all of them.

Every rank sees the same rows and holds its features' part of every tensor. A step exchanges the ranks' parts of x̂ in
float32 (64 MB at 4096 × 4096) and five numbers; splitting rows instead would exchange all gradients (2.1 GB at
4096 × 65,536). Results equal those of one process up to the order of sums; the same number of ranks gives the same
bytes. b_dec is updated by each rank from the same summed numbers, and so stays equal without an exchange.

Shape suffixes: R ranks, K numbers of each.
"""

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harvest.device import local_device, local_rank
from harvest.files import UserError
from harvest.progress import duration
from harvest.workers import Workers
from train.sae import Sae

Axes = Mapping[str, int | None]  # where the features are in a tensor, by the last part of its name
ALIGNED = 64  # features: a GPU's products of other widths take a slower way
# Others wait while rank 0 looks at the store or writes a checkpoint. A rank that died is the launcher's to see.
TIMEOUT = timedelta(hours=2)
SIGNALS_AFTER = 1.0  # seconds: torch's waiting lets Python see no signal, so it is done in pieces


class FeatureRanks:
    """The ranks of torch.distributed's default group; without arguments, one process and no exchange.

    All but `features`, `shard` and `shard_tensors` are collective: every rank calls them, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        """device is this rank's, when the group was made for one."""
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")

    @classmethod
    def from_environment(cls, device: torch.device, peers_seconds: float = 60.0) -> "FeatureRanks":
        """The ranks that accelerate launch or torchrun started (WORLD_SIZE, RANK, ...), one process without.

        On CUDA, `.device` is this rank's GPU. Raises UserError for values that cannot be, when the others do not come
        within `peers_seconds`, and when a machine has fewer GPUs than ranks.
        """
        workers = Workers.from_environment()
        if workers.world == 1:
            return cls(device=device)
        local_rank()
        device = local_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            _join(backend, f"RANK={workers.rank}, WORLD_SIZE={workers.world}", peers_seconds)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def close(self) -> None:
        """Leave the group, at the end of a run that went well."""
        if self.size > 1:
            dist.destroy_process_group()

    def features(self, d_sae: int, rank: int | None = None) -> range:
        """The features of a rank (this one).

        Raises UserError when there are fewer features than ranks.
        """
        if d_sae < self.size:
            raise UserError(f"train.sae: {d_sae} features for {self.size} ranks; start at most one process a feature")
        rank = self.rank if rank is None else rank
        unit = ALIGNED if self.device.type == "cuda" and d_sae >= ALIGNED * self.size else 1
        bounds = [d_sae * n // self.size // unit * unit for n in range(self.size)]
        return range(*[*bounds, d_sae][rank : rank + 2])

    def sum(self, part: Tensor) -> Tensor:
        """The sum of the ranks' tensors, all of one shape, in place: the same bytes on all of them."""
        if self.size > 1 and part.device.type == "cpu":
            _finish(dist.all_reduce(part, async_op=True))
        elif self.size > 1:
            dist.all_reduce(part)
        return part

    def each(self, part_K: Tensor) -> Tensor:
        """(K,) of each rank -> (size, K)."""
        if self.size == 1:
            return part_K.unsqueeze(0)
        parts_RK = part_K.new_empty(self.size, len(part_K))
        if part_K.device.type == "cpu":
            _finish(dist.all_gather(list(parts_RK), part_K, async_op=True))
        else:
            dist.all_gather(list(parts_RK), part_K)
        return parts_RK

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; waits for hosts, never for a device."""
        if self.size > 1:
            flags = torch.tensor(flag, dtype=torch.int32)
            _finish(dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True))
            return bool(flags)
        return flag

    def shard(self, sae: Sae) -> Sae:
        """This rank's features of a whole SAE, each tensor contiguous, sharing no memory with it.

        One process gets the SAE itself.
        """
        if self.size == 1:
            return sae
        mine = self.shard_tensors(sae.parameters, sae.feature_axes())
        return replace(sae, parameters=mine, first_feature=self.features(sae.d_sae).start)

    def shard_tensors(self, whole: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
        """This rank's part of whole tensors, names and shapes as in `Trainer.tensors`: the inverse of `gather`."""
        if self.size == 1:
            return dict(whole)
        out = {}
        for name, tensor in whole.items():
            axis = axes[name.rpartition(".")[2]]
            if axis is not None:
                features = self.features(tensor.shape[axis])
                tensor = tensor.narrow(axis, features.start, len(features))
            out[name] = tensor.clone(memory_format=torch.contiguous_format)
        return out

    def gather(
        self, tensors: Mapping[str, Tensor], axes: Axes, d_sae: int, host: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Whole tensors on the host of rank 0, shapes of d_sae features, copies all; other ranks get none.

        Those of a name in `host` are written over there; new ones are put there, pinned if they come from a GPU: so
        the next copy runs at the speed of the bus. On a device it takes memory for one other rank's largest tensor, not
        for a whole one.
        """
        host, out = {} if host is None else host, {}
        for name, mine in tensors.items():
            axis = axes[name.rpartition(".")[2]]
            if self.rank and axis is not None:
                dist.send(mine, 0)
            if self.rank:
                continue
            shape = list(mine.shape)
            if axis is not None:
                shape[axis] = d_sae
            if name not in host:
                host[name] = torch.empty(shape, dtype=mine.dtype, pin_memory=mine.is_cuda)
            out[name] = host[name]
            if axis is None:
                out[name].copy_(mine)
                continue
            for rank in range(self.size):
                places, part = self.features(d_sae, rank), mine
                if rank:
                    shape[axis] = len(places)
                    part = torch.empty(shape, dtype=mine.dtype, device=mine.device)
                    dist.recv(part, rank)
                here = out[name].narrow(axis, places.start, len(places))
                if not here.is_contiguous():  # torch would copy a part of rows through memory that is not pinned
                    key = f"{name} of rank {rank}"
                    if key not in host:
                        host[key] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                    part = host[key].copy_(part)
                here.copy_(part)
        return out


SINGLE = FeatureRanks()


def _join(backend: str, me: str, seconds: float) -> None:
    """Make the group, in a thread: a signal ends the waiting here at once.

    Raises UserError when nobody says where the others are, and when they do not come.
    """
    unset = "or unset RANK and WORLD_SIZE to train in one process"
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise UserError(
            f"{me}: where the processes meet is not said (MASTER_ADDR={address or ''}, MASTER_PORT={port}); start them "
            f"with torchrun or accelerate launch, {unset}"
        )
    met: Future[None] = Future()

    def join() -> None:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
            met.set_result(None)
        except Exception as error:
            met.set_exception(error)

    threading.Thread(target=join, name="join-ranks", daemon=True).start()
    began = time.monotonic()
    while not met.done() and time.monotonic() - began < seconds:
        time.sleep(0.05)
    if met.done() and (error := met.exception()):
        raise UserError(
            f"{me}: the processes cannot meet at {address}:{port} ({_reason(error)}); choose another port, {unset}"
        )
    if not met.done():
        raise UserError(
            f"{me}: the other processes did not come to {address}:{port} within {duration(seconds)} "
            f"(train.runtime.peers_seconds); start all of them with torchrun or accelerate launch, {unset}"
        )


def _finish(work: Any) -> None:
    """Wait for an exchange on hosts.

    Raises UserError when another process has ended.
    """
    while True:
        try:
            work.wait(timedelta(seconds=SIGNALS_AFTER))
            return
        except RuntimeError as error:
            if work.is_completed():
                raise UserError(
                    f"train: another process of this training has ended ({_reason(error)}); start all of them again, "
                    "to go on from the last checkpoint"
                ) from None


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
