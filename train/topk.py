"""TopK: the k largest entries of a row are its features, so nothing needs a penalty (arXiv 2406.04093).

Entries are compared by z‖W_dec,i‖, what a feature adds to x̂, so that the choice does not hang on how a feature shares
its size between encoder and decoder (SAELens: rescale_acts_by_decoder_norm). A finished SAE has decoder rows of
norm 1: there it is z itself.

Features that have not fired for a while are dead; the aux_k largest of them in a row rebuild what the others leave
(appendix A.2 there), so that they come back.

Shape suffixes: B rows of a batch, D d_in, F d_sae, K dead features.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from harvest.files import UserError
from train.nonzeros import Rule
from train.sae import Auxiliary, Dead, Sae
from train.selection import largest_dense
from train.sparse_step import SPARSE
from train.step import AUTOGRAD


@dataclass(frozen=True, eq=False)
class TopK(Sae):
    """f = z of the k largest positive z of a row, else 0, loss ‖x − x̂‖² + aux (arXiv 2406.04093)"""

    kind = "topk"
    rule = ("k",)
    saelens = "topk"
    decoder_norm = 1.0
    kernels: ClassVar = {"dense": AUTOGRAD, "sparse": SPARSE}
    of_batch: ClassVar[bool] = False

    k: int = 1
    aux_coefficient: float = 0.0
    aux_k: int = 0
    by_decoder_norm: bool = False

    @property
    def weight_F(self) -> Tensor:
        """What z is multiplied by to be compared (F,)."""
        return self.W_dec.detach().norm(dim=1) if self.by_decoder_norm else torch.ones_like(self.b_enc)

    def batch_rule(self) -> Rule:
        return Rule(largest=self.k, of_batch=self.of_batch, weight_F=self.weight_F)

    def batch_activations(self, z_BF: Tensor) -> Tensor:
        return torch.where(largest_dense(z_BF.detach() * self.weight_F, self.k, self.of_batch), z_BF, 0)

    def activations(self, z_BF: Tensor) -> Tensor:
        return self.batch_activations(z_BF)

    def auxiliary(self, dead: int) -> Auxiliary | None:
        # Scaled down while they are few (SAELens).
        return Auxiliary(min(self.aux_k, dead), min(1.0, dead / self.aux_k)) if dead and self.aux_coefficient else None

    def revival(self, z_BF: Tensor, error_BD: Tensor, dead: Dead | None) -> dict[str, Tensor]:
        auxiliary = self.auxiliary(dead.total) if dead else None
        if not dead or not auxiliary:
            return {}
        z_BK, weight_K = z_BF[:, dead.feature_K], self.weight_F[dead.feature_K]
        f_BK = torch.where(largest_dense(z_BK.detach() * weight_K, auxiliary.k, False), z_BK, 0)
        left_BD = f_BK @ self.W_dec[dead.feature_K] + error_BD.detach()
        return {"aux": auxiliary.scale * left_BD.square().sum(1).mean()}

    @property
    def coefficients(self) -> dict[str, float]:
        return {"aux": self.aux_coefficient}

    def finished(self) -> Self:
        norm_F = self.weight_F
        unit = {
            "W_enc": self.W_enc * norm_F,
            "b_enc": self.b_enc * norm_F,
            "W_dec": self.W_dec / norm_F.clamp_min(1e-30)[:, None],
        }
        return replace(self, parameters=self.parameters | unit, by_decoder_norm=False)

    @classmethod
    def initial(cls, d_in: int, d_sae: int, *args: Any, **hyperparameters: Any) -> Self:
        """As of any kind.

        Raises UserError when k is above d_sae.
        """
        if (k := hyperparameters["k"]) > d_sae:
            raise UserError(f"train.sae.k: {k}: the SAE has {d_sae:,} features; choose at most as many")
        aux_k = hyperparameters.pop("aux_k", None) or max(1, d_in // 2)  # the paper's
        return super().initial(d_in, d_sae, *args, aux_k=aux_k, by_decoder_norm=True, **hyperparameters)
