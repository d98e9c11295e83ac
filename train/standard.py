"""The standard SAE: ReLU, and an L1 penalty weighted by the norms of the decoder rows (arXiv 2503.18878, eq. 3).

Shape suffixes: B rows of a batch, F d_sae.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from train.dense_step import dense_reconstruction, dense_step
from train.nonzeros import Rule
from train.sae import Sae
from train.sparse_step import SPARSE
from train.step import Kernel


@dataclass(frozen=True, eq=False)
class Standard(Sae):
    """f = ReLU(z), loss ‖x − x̂‖² + l1_coefficient Σ_i f_i ‖W_dec,i‖ (arXiv 2503.18878)"""

    kind = "standard"
    saelens = "standard"
    elementwise = True
    parts = ("l1",)
    kernels: ClassVar = {
        "dense": Kernel(dense_step, dense_reconstruction),
        "sparse": SPARSE,
    }

    l1_coefficient: float = 0.0

    def activations(self, z_BF: Tensor) -> Tensor:
        return torch.relu(z_BF)

    def batch_rule(self) -> Rule:
        return Rule()

    def penalties(self, f_BF: Tensor) -> dict[str, Tensor]:
        return {"l1": (f_BF * self.W_dec.norm(dim=1)).sum(1).mean()}

    @property
    def coefficients(self) -> dict[str, float]:
        return {"l1": self.l1_coefficient}
