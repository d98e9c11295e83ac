"""One SAE trained by several processes: the features are split over ranks, b_dec is on all of them.

Every rank sees the same rows and holds columns of W_enc and rows of W_dec, with their gradients and Adam's
moments. A step exchanges the ranks' parts of x̂ in float32 (64 MB at 4096 × 4096) and five numbers;
splitting rows instead would exchange all gradients (2.1 GB at 4096 × 65,536).
Results equal those of one process up to the order of sums; the same number of ranks gives the same bytes.
b_dec is updated by each rank from the same summed numbers, and so stays equal without an exchange.

Shape suffixes: R ranks, K numbers of each.
"""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from harvest.device import local_device
from harvest.files import UserError
from train.sae import SAE
from train.step import SumOverRanks

# Where the features are in a tensor of a trainer; the last part of its name tells.
FEATURE_AXIS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": None, "rows_since_fired": 0}
# Others wait while rank 0 looks at the store or writes a checkpoint. A rank that died is the launcher's to see.
TIMEOUT = timedelta(hours=2)


class FeatureRanks:
    """The ranks of torch.distributed's default group; without arguments, one process and no exchange.

    All but `features`, `shard` and `shard_tensors` are collective: every rank calls them, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        """device is this rank's, when the group was made for one."""
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")

    @classmethod
    def from_environment(cls, device: torch.device) -> "FeatureRanks":
        """The ranks that accelerate launch or torchrun started (WORLD_SIZE, RANK, ...), one process without.

        On CUDA, `.device` is this rank's GPU. Raises UserError when a machine has fewer GPUs than ranks.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=device)
        device = local_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def close(self) -> None:
        """Leave the group, at the end of a run that went well."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def sum_over_ranks(self) -> SumOverRanks | None:
        """What `dense_step` and `sparse_step` take."""
        return self.sum if self.size > 1 else None

    def features(self, d_sae: int, rank: int | None = None) -> range:
        """The features of a rank (this one).

        Raises UserError when there are fewer features than ranks.
        """
        if d_sae < self.size:
            raise UserError(f"train.sae: {d_sae} features for {self.size} ranks; start at most one process a feature")
        rank = self.rank if rank is None else rank
        return range(d_sae * rank // self.size, d_sae * (rank + 1) // self.size)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of the ranks' tensors, all of one shape, in place: the same bytes on all of them."""
        if self.size > 1:
            dist.all_reduce(part)
        return part

    def each(self, part_K: Tensor) -> Tensor:
        """(K,) of each rank -> (size, K)."""
        if self.size == 1:
            return part_K.unsqueeze(0)
        parts_RK = part_K.new_empty(self.size, len(part_K))
        dist.all_gather(list(parts_RK), part_K)
        return parts_RK

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; waits for hosts, never for a device."""
        if self.size > 1:
            flags = torch.tensor(flag, dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            return bool(flags)
        return flag

    def shard(self, sae: SAE) -> SAE:
        """This rank's features of a whole SAE, each tensor contiguous, sharing no memory with it.

        One process gets the SAE itself.
        """
        return SAE(**self.shard_tensors(sae._asdict()))

    def shard_tensors(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of whole tensors, names and shapes as in `Trainer.tensors`: the inverse of `gather`."""
        if self.size == 1:
            return dict(whole)
        out = {}
        for name, tensor in whole.items():
            axis = _feature_axis(name)
            mine = tensor
            if axis is not None:
                features = self.features(tensor.shape[axis])
                mine = tensor.narrow(axis, features.start, len(features))
            out[name] = mine.clone(memory_format=torch.contiguous_format)
        return out

    def gather(self, tensors: Mapping[str, Tensor], d_sae: int) -> dict[str, Tensor]:
        """Whole tensors on the host of rank 0, shapes of d_sae features, copies all; other ranks get none.

        On a device it takes memory for one other rank's largest tensor, not for a whole one.
        """
        if self.size == 1:
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        out = {}
        for name, mine in tensors.items():
            axis = _feature_axis(name)
            if self.rank:
                if axis is not None:
                    dist.send(mine, 0)
            elif axis is None:
                out[name] = mine.to("cpu", copy=True)
            else:
                shape = [*mine.shape[:axis], d_sae, *mine.shape[axis + 1 :]]
                out[name] = torch.empty(shape, dtype=mine.dtype)
                for rank in range(self.size):
                    features = self.features(d_sae, rank)
                    place = out[name].narrow(axis, features.start, len(features))
                    part = mine if rank == 0 else torch.empty(place.shape, dtype=mine.dtype, device=mine.device)
                    if rank:
                        dist.recv(part, rank)
                    place.copy_(part)
        return out


SINGLE = FeatureRanks()


def _feature_axis(name: str) -> int | None:
    return FEATURE_AXIS[name.rpartition(".")[2]]
