"""Which features a rank has, and what it holds of an SAE: no group of processes is needed for it."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harvest.files import UserError
from train.config import KINDS, SaeConfig, TrainConfig
from train.kinds import new_sae
from train.parallel import SINGLE, FeatureRanks
from train.sae import DRAWN, DRAWN_TOGETHER
from train.standard import Standard
from train.trainer import Trainer

D_IN, D_SAE = 32, 100


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_every_feature_has_one_rank(size: int) -> None:
    found = [FeatureRanks(rank, size).features(D_SAE) for rank in range(size)]
    assert [feature for features in found for feature in features] == list(range(D_SAE))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_on_gpus_the_parts_are_multiples_of_64() -> None:
    """A product of another width is a slow one there."""
    found = [FeatureRanks(rank, 3, torch.device("cuda")).features(65_536) for rank in range(3)]
    assert found == [range(21_824), range(21_824, 43_648), range(43_648, 65_536)]
    few = [FeatureRanks(rank, 3, torch.device("cuda")).features(100) for rank in range(3)]
    assert few == [range(33), range(33, 66), range(66, 100)]


def test_a_shard_is_contiguous_and_a_copy() -> None:
    whole = Standard.initial(D_IN, D_SAE)
    for rank in range(3):
        ranks = FeatureRanks(rank, 3)
        mine, features = ranks.shard(whole), ranks.features(D_SAE)
        assert torch.equal(mine.W_enc, whole.W_enc[:, features.start : features.stop])
        assert torch.equal(mine.W_dec, whole.W_dec[features.start : features.stop])
        assert torch.equal(mine.b_dec, whole.b_dec)
        for a, b in zip(mine.parameters.values(), whole.parameters.values(), strict=True):
            assert a.is_contiguous() and a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert SINGLE.shard(whole).W_enc is whole.W_enc


def test_a_rank_takes_its_features_alone_to_its_device() -> None:
    config, ranks = TrainConfig(sae=SaeConfig(d_sae=D_SAE, l1_coefficient=1.0), epochs=1), FeatureRanks(1, 3)
    own, meta = new_sae(config, D_IN, 1.0, "cpu", ranks), torch.device("meta")
    trainer = Trainer(own, config, 10, 1000, torch.float32, ranks, meta)
    mine = len(ranks.features(D_SAE))
    tensors = trainer._own_tensors()
    assert {tensor.device for tensor in [*tensors.values(), trainer.bad_step]} == {trainer.device} == {meta}
    assert {tuple(t.shape) for t in tensors.values()} == {(D_IN, mine), (mine,), (mine, D_IN), (D_IN,)}
    assert own.W_enc.device.type == "cpu" and trainer.d_sae == D_SAE


class _Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_draws_its_features_of_the_whole_sae_and_holds_no_others(kind):
    """4,101 features for a piece of 4,096: the last 5 rows are drawn with the others, as 32 numbers would be alone."""
    for d_in, d_sae in ((2, 4101), (D_IN, 3 * DRAWN + 21), (3, 5)):
        k = {"k": 2} if kind in ("topk", "batchtopk", "matryoshka") else {}
        config = TrainConfig(sae=SaeConfig(kind=kind, d_sae=d_sae, **k), epochs=1, seed=7)
        whole = new_sae(config, d_in, 2.0, "cpu")
        W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(7))
        W_dec *= whole.decoder_norm / W_dec.norm(dim=1, keepdim=True)
        assert torch.equal(whole.W_dec, W_dec) and torch.equal(whole.W_enc, W_dec.t())
        for rank in range(5):
            ranks = FeatureRanks(rank, 5)
            with _Largest() as largest:
                mine = new_sae(config, d_in, 2.0, "cpu", ranks)
            wanted = ranks.shard(whole)
            assert mine.first_feature == wanted.first_feature and mine.settings() == wanted.settings()
            for name, weight in mine.parameters.items():
                assert torch.equal(weight, wanted.parameters[name]) and weight.is_contiguous()
            assert largest.numbers <= max(DRAWN + DRAWN_TOGETHER, len(wanted.b_enc)) * d_in


def test_more_ranks_than_features_is_an_error() -> None:
    with pytest.raises(UserError, match="4 features for 5 ranks"):
        FeatureRanks(0, 5).shard(Standard.initial(8, 4))


def test_more_ranks_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="start no more processes than GPUs"):
        FeatureRanks.from_environment(torch.device("cuda", 0))


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = FeatureRanks.from_environment(torch.device("cpu"))
    assert ranks.size == 1
    assert ranks.any(True) and not ranks.any(False)
    assert not dist.is_initialized()
    ranks.close()
