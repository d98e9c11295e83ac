"""The kinds of SAE by name."""

from collections.abc import Mapping
from pkgutil import resolve_name

import torch

from harvest.files import UserError
from train.config import KINDS, TrainConfig
from train.parallel import SINGLE, FeatureRanks
from train.sae import Sae
from train.sparse_step import SPARSE
from train.step import Kernel


def sae_class(kind: str) -> type[Sae]:
    """The class of a kind.

    Raises KeyError where there is none.
    """
    return resolve_name(KINDS[kind].place)


def saelens_classes() -> dict[str, type[Sae]]:
    """The class that reads each architecture of SAELens; of several the first."""
    out: dict[str, type[Sae]] = {}
    for kind in KINDS:
        of_kind = sae_class(kind)
        if of_kind.saelens:
            out.setdefault(of_kind.saelens, of_kind)
    return out


def check_class(sae: Sae, kernels: Mapping[str, Kernel]) -> None:
    """Raise UserError for a class whose training or evaluation would be wrong without an error."""
    row = torch.linspace(-1, 1, sae.d_sae, device=sae.W_enc.device).unsqueeze(0)
    if (sae.activations(row) < 0).any():
        said = "`activations` are below 0, and every stage takes a feature to fire above 0"
        raise UserError(f"train.sae.kind: {sae.kind!r}: {said}; give none below 0")
    if SPARSE in kernels.values() and type(sae).penalties is not Sae.penalties and "l1" not in sae.parts:
        said = "the sparse step that kinds share has no gradients of its `penalties`"
        raise UserError(f"train.sae.kind: {sae.kind!r}: {said}; take SPARSE out of `kernels`")


def new_sae(
    config: TrainConfig, d_in: int, scale: float, device: torch.device | str, ranks: FeatureRanks = SINGLE
) -> Sae:
    """The SAE that settings begin with: the features of this one of `ranks`.

    Raises UserError where its kind cannot be of this size, and when there are fewer features than ranks.
    """
    chosen = config.sae
    of_kind, d_sae = sae_class(chosen.kind), chosen.width(d_in)
    mine = ranks.features(d_sae)
    return of_kind.initial(d_in, d_sae, config.seed, device, scale, features=mine, **chosen.hyperparameters())
