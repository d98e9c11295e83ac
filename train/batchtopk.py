"""BatchTopK: the k·B largest entries of a batch of B rows are active (arXiv 2412.06410), so a row has what it needs.

A row alone has no batch: there an entry is active above θ, a running mean of the smallest score that batches took.

Shape suffixes: B rows of a batch, F d_sae.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from train.jumprelu import JumpRelu
from train.nonzeros import Rule
from train.sae import Sae
from train.sparse_step import SPARSE
from train.step import AUTOGRAD
from train.topk import TopK


@dataclass(frozen=True, eq=False)
class BatchTopK(TopK):
    """f = z of the k·B largest positive z of a batch, of a row alone those above θ, loss ‖x − x̂‖² + aux
    (arXiv 2412.06410)"""

    kind = "batchtopk"
    dims = TopK.dims | {"threshold": ()}
    running = ("threshold",)
    saelens = None  # exported as a JumpReLU
    elementwise = True
    kernels: ClassVar = {"dense": AUTOGRAD, "sparse": SPARSE}
    of_batch = True

    @property
    def threshold_F(self) -> Tensor:
        """What z of a row alone has to be above (F,): θ speaks of scores."""
        return self.threshold / self.weight_F

    def reading_rule(self) -> Rule:
        """Above θ."""
        return Rule(above_F=self.threshold_F)

    def activations(self, z_BF: Tensor) -> Tensor:
        """f (B, F) of rows that are no batch."""
        return torch.relu(z_BF) * (z_BF > self.threshold_F)

    def smallest(self, f_BF: Tensor) -> Tensor:
        """The smallest score that the batch took, 0-d; 0 where every positive entry was taken."""
        score_BF = f_BF * self.weight_F
        full = (score_BF > 0).sum() >= self.k * len(f_BF)
        return torch.where(full, score_BF.where(score_BF > 0, torch.inf).amin(), 0.0)

    def exported(self) -> Sae:
        """The JumpReLU SAE with the same f for a row alone."""
        return JumpRelu.from_published(self.parameters | {"threshold": self.threshold_F}, self.scale)
