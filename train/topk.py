"""TopK: the k largest pre-activations of a row are its features, so nothing needs a penalty (arXiv 2406.04093).

Shape suffixes: B rows of a batch, F d_sae.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from harvest.files import UserError
from train.sae import Sae


@dataclass(frozen=True, eq=False)
class TopK(Sae):
    """f = ReLU of the k largest z of a row, else 0, loss ‖x − x̂‖² (arXiv 2406.04093)"""

    kind = "topk"
    rule = ("k",)
    saelens = "topk"

    k: int = 1

    def activations(self, z_BF: Tensor) -> Tensor:
        top = z_BF.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(z_BF).scatter(1, top.indices, top.values.relu())

    @classmethod
    def initial(cls, d_in: int, d_sae: int, *args: Any, **hyperparameters: Any) -> Self:
        """As of any kind.

        Raises UserError when k is above d_sae.
        """
        if (k := hyperparameters["k"]) > d_sae:
            raise UserError(f"train.sae.k: {k}: the SAE has {d_sae:,} features; choose at most as many")
        return super().initial(d_in, d_sae, *args, **hyperparameters)
