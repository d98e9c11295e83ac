"""The kinds of SAE by name."""

from pkgutil import resolve_name

import torch

from train.config import KINDS, TrainConfig
from train.sae import Sae


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


def new_sae(config: TrainConfig, d_in: int, scale: float, device: torch.device | str) -> Sae:
    """The SAE that settings begin with.

    Raises UserError where its kind cannot be of this size.
    """
    chosen = config.sae
    of_kind = sae_class(chosen.kind)
    return of_kind.initial(d_in, chosen.width(d_in), config.seed, device, scale, **chosen.hyperparameters())
