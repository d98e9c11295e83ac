"""JumpReLU, which can be read and measured, not trained (arXiv 2407.14435).

Shape suffixes: B rows of a batch, F d_sae.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.sae import Sae


@dataclass(frozen=True, eq=False)
class JumpRelu(Sae):
    """f = z where it is positive and above the feature's threshold, else 0 (arXiv 2407.14435)"""

    kind = "jumprelu"
    saelens = "jumprelu"
    elementwise = True
    dims = Sae.dims | {"threshold": ("d_sae",)}

    def activations(self, z_BF: Tensor) -> Tensor:
        return torch.relu(z_BF) * (z_BF > self.threshold)
