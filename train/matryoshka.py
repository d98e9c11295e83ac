"""Matryoshka: a BatchTopK SAE whose first features rebuild the row alone too, prefix by prefix (arXiv 2503.17547).

    loss = Σ over prefixes w_1 < … < w_M = d_sae of mean ‖x − x̂ of features below w_m‖²

So the general features come first, and are not split among the many that come later.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from harvest.files import UserError
from train.batchtopk import BatchTopK
from train.sparse_step import SPARSE
from train.step import AUTOGRAD

SHARES = (16, 8, 4, 2, 1)  # d_sae over these: the default prefixes


@dataclass(frozen=True, eq=False)
class Matryoshka(BatchTopK):
    """as batchtopk, loss Σ over nested prefixes of features ‖x − x̂_≤w‖² + aux (arXiv 2503.17547)"""

    kind = "matryoshka"
    rule = ("k", "prefixes")
    kernels: ClassVar = {"dense": AUTOGRAD, "sparse": SPARSE}

    prefixes: tuple[int, ...] = ()

    @property
    def levels(self) -> tuple[int, ...]:
        """Ends of the prefixes."""
        return tuple(self.prefixes)

    @classmethod
    def initial(cls, d_in: int, d_sae: int, *args: Any, **hyperparameters: Any) -> Self:
        """As of any kind.

        Raises UserError for prefixes that do not rise to d_sae, and when k is above d_sae.
        """
        prefixes = hyperparameters.pop("prefixes", None)
        prefixes = prefixes or tuple(sorted({max(1, d_sae // share) for share in SHARES}))
        if list(prefixes) != sorted(set(prefixes)) or prefixes[-1] != d_sae or prefixes[0] < 1:
            said = f"train.sae.prefixes: {list(prefixes)}: not widths that rise to d_sae = {d_sae:,}"
            raise UserError(f"{said}; the last one is d_sae itself")
        return super().initial(d_in, d_sae, *args, prefixes=prefixes, **hyperparameters)
