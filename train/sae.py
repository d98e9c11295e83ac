"""A sparse autoencoder: its tensors, and what anybody may ask of one, whatever its kind.

    f = activations(s·x W_enc + b_enc)        x̂ = (f W_dec + b_dec) / s        (arXiv 2503.18878, section 2)

A kind is a subclass in a file of its own (train/standard.py, train/topk.py). Rows come and go as they are stored: the
input scale s is inside, so nobody outside multiplies by it. f is at the scaled input.

Shape suffixes: B rows of a batch, D d_in (of a target: d_out), F d_sae, K chosen features, N active
entries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from train.nonzeros import ByRow, Rule, offsets

DECODER_NORM = 0.1  # SAELens' decoder_init_norm for standard SAEs
DRAWN = 4096  # decoder rows drawn at a time
# torch draws 16 numbers at a time; of fewer, and the last 16 of any, in another way. So a piece has as many rows.
DRAWN_TOGETHER = 16


class Losses(NamedTuple):
    """A batch's loss, and what the figures of a step are made of."""

    terms: dict[str, Tensor]  # 0-d, by the names that the log has; penalties before their coefficients
    f_BF: Tensor
    error_BD: Tensor  # x̂ − target, at the SAE's scale


class Dead(NamedTuple):
    """Features that have not fired for a while."""

    feature_K: Tensor  # int64, among those of an SAE or of a rank's part
    total: int  # on all ranks


class Auxiliary(NamedTuple):
    """A loss "aux" that lets dead features rebuild the residual: scale · mean over rows of ‖ê − (x − x̂)‖²."""

    k: int  # of them in a row
    scale: float


@dataclass(frozen=True, eq=False)
class Sae:
    """An SAE of some kind. A subclass states what `activations` are and what they pay; fields that it adds are its
    hyperparameters.

    Each parameter is an attribute too (`sae.W_dec`). All are contiguous float32: fused Adam reads a gradient in its
    parameter's memory layout, so a transposed view would be updated in the wrong elements without an error.
    """

    kind: ClassVar[str]  # the word of train.sae.kind
    dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",),
    }  # fmt: skip
    rule: ClassVar[tuple[str, ...]] = ()  # hyperparameters that decide f, and so are saved beside the weights
    saelens: ClassVar[str | None] = None  # SAELens' architecture with the same f; None cannot be exported
    elementwise: ClassVar[bool] = False  # whether an activation depends on its own pre-activation alone
    running: ClassVar[tuple[str, ...]] = ()  # parameters that follow the batches, without a gradient
    parts: ClassVar[tuple[str, ...]] = ()  # terms of the loss that are sums over features: a rank has a part of each
    published_names: ClassVar[dict[str, str]] = {}  # SAELens' names of parameters that it has in another form
    rates: ClassVar[dict[str, float]] = {}  # what multiplies the lr of a parameter
    decoder_norm: ClassVar[float] = DECODER_NORM  # of the first decoder rows

    parameters: dict[str, Tensor] = field(repr=False)  # in the order of `dims`
    scale: float = 1.0
    first_feature: int = 0  # of all, where these are a rank's

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["parameters"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name}") from None

    def activations(self, z_BF: Tensor) -> Tensor:
        """f (B, F), non-negative, from pre-activations."""
        raise NotImplementedError

    def batch_rule(self) -> Rule:
        """Which entries of a training batch are active."""
        raise NotImplementedError

    def reading_rule(self) -> Rule:
        """Which entries `encode` takes."""
        return self.batch_rule()

    def batch_activations(self, z_BF: Tensor) -> Tensor:
        """f (B, F) of a training batch; differs from `activations` where a batch has a rule of its own."""
        return self.activations(z_BF)

    def penalties(self, f_BF: Tensor) -> dict[str, Tensor]:
        """What the loss has beside the squared error: 0-d terms, before their coefficients."""
        del f_BF
        return {}

    def gates(self, z_BF: Tensor) -> dict[str, Tensor]:
        """What learnt thresholds pay, from pre-activations (B, F): 0-d terms."""
        del z_BF
        return {}

    def nested(self, f_BF: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """The squared error of the prefixes of features before the last: a 0-d term."""
        if len(self.levels) == 1:
            return {}
        x_BD, terms = self.scaled(target_BD), []
        for end in self.levels[:-1]:
            x_hat_BD = torch.addmm(self.b_dec, f_BF[:, :end], self.W_dec[:end]).float()
            terms.append((x_hat_BD - x_BD).square().sum(1).mean())
        return {"inner": torch.stack(terms).sum()}

    def revival(self, z_BF: Tensor, error_BD: Tensor, dead: Dead | None) -> dict[str, Tensor]:
        """What dead features leave of the residual, a 0-d term; see `Auxiliary`."""
        del z_BF, error_BD, dead
        return {}

    @property
    def levels(self) -> tuple[int, ...]:
        """Ends of the nested prefixes of features that each rebuild the row."""
        return (self.d_sae,)

    def split(self, entries: ByRow) -> tuple[ByRow, ByRow | None]:
        """The active ones of the entries that `batch_rule` takes, and those that thresholds learn from."""
        return entries, None

    def l0_terms(self, l0_B: Tensor) -> dict[str, Tensor]:
        """What rows pay for their numbers of active features, (B,), before coefficients."""
        del l0_B
        return {}

    def threshold_gradients(
        self, near: ByRow, df_N: Tensor, l0_B: Tensor, coefficients: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Gradients of learnt thresholds (F,), from entries near them and the squared error's gradients df there."""
        raise NotImplementedError

    def smallest(self, f_BF: Tensor) -> Tensor | None:
        """The smallest score that the rule took in a batch, 0-d; None where nothing follows it."""
        del f_BF
        return None

    def auxiliary(self, dead: int) -> Auxiliary | None:
        """What so many dead features are for; None where they are left alone."""
        del dead
        return None

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that have gradients, shapes as in `shapes`."""
        return {name: weight for name, weight in self.parameters.items() if name not in self.running}

    def finished(self) -> Self:
        """The same function as it is saved, once it is trained."""
        return self

    def exported(self) -> "Sae":
        """The SAE of a kind that SAELens has, with the same f."""
        return self

    def published(self) -> dict[str, Tensor]:
        """The parameters by the names and in the forms that SAELens has, shapes as in `shapes`."""
        return self.parameters

    @classmethod
    def from_published(cls, tensors: dict[str, Tensor], scale: float, **rule: Any) -> Self:
        """The SAE of parameters as `published` gives them, shapes too."""
        return cls(tensors, scale, **rule)

    @property
    def coefficients(self) -> dict[str, float]:
        """What multiplies terms of the loss; rises over train.l1_warmup_fraction. Other terms count once."""
        return {}

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def scaled(self, x_BD: Tensor) -> Tensor:
        """Stored rows as the weights see them, float32 (B, D)."""
        return x_BD.float() * self.scale

    def encode(self, x_BD: Tensor) -> Tensor:
        """Feature activations f (B, F) of stored rows."""
        return self.activations(torch.addmm(self.b_enc, self.scaled(x_BD), self.W_enc))

    def columns(self, x_BD: Tensor, features: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """`encode(x)[:, features]` (B, K), to the last bits, without the others where the kind allows it."""
        index_K = torch.as_tensor(features, dtype=torch.long, device=self.W_enc.device)
        if not self.elementwise:
            return self.encode(x_BD)[:, index_K]
        axes = {name: axis for name, axis in self.feature_axes().items() if axis is not None}
        mine = {name: self.parameters[name].index_select(axis, index_K) for name, axis in axes.items()}
        return replace(self, parameters=self.parameters | mine).encode(x_BD)

    def nonzeros(self, x_BD: Tensor) -> ByRow:
        """The active features of stored rows in CSR: `encode` without its zeros."""
        f_BF = self.encode(x_BD)
        row_N, feature_N = f_BF.nonzero(as_tuple=True)
        return ByRow(offsets((f_BF != 0).sum(1)), feature_N.int(), f_BF[row_N, feature_N])

    def decode(self, f_BF: Tensor) -> Tensor:
        """Rebuilt rows x̂ (B, D), in units of stored rows."""
        return torch.addmm(self.b_dec, f_BF, self.W_dec) / self.scale

    def direction(self, features: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """What a unit of each feature adds to a stored row, (K, D)."""
        return self.W_dec[torch.as_tensor(features, dtype=torch.long, device=self.W_dec.device)] / self.scale

    def loss(self, x_BD: Tensor, target_BD: Tensor, dead: Dead | None = None) -> Losses:
        """The terms of a training batch's loss; both are stored rows, and differ in a transcoder alone."""
        z_BF = torch.addmm(self.b_enc, self.scaled(x_BD), self.W_enc)
        f_BF = self.batch_activations(z_BF)
        error_BD = torch.addmm(self.b_dec, f_BF, self.W_dec).float() - self.scaled(target_BD)
        terms = {"mse": error_BD.square().sum(1).mean(), **self.penalties(f_BF), **self.gates(z_BF)}
        return Losses(terms | self.nested(f_BF, target_BD) | self.revival(z_BF, error_BD, dead), f_BF, error_BD)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return replace(self, parameters={name: weight.to(device) for name, weight in self.parameters.items()})

    def centered(self, mean_D: np.ndarray) -> Self:
        """The same around a mean row (D,), in stored units: b_dec is it, and W_enc sees rows less it.

        Computed in float64 on the CPU, so that every device starts from the same bytes.
        """
        mean_D = mean_D * self.scale
        parts = [mean_D @ part.double().cpu().numpy() for part in self.W_enc.split(4096, dim=1)]
        biases = {"b_enc": self.b_enc.double().cpu().numpy() - np.concatenate(parts), "b_dec": mean_D}
        moved = {name: torch.from_numpy(bias).float().to(self.W_enc.device) for name, bias in biases.items()}
        return replace(self, parameters=self.parameters | moved)

    def settings(self) -> dict[str, Any]:
        """The hyperparameters that decide f, by name."""
        return {name: getattr(self, name) for name in self.rule}

    @classmethod
    def feature_axes(cls) -> dict[str, int | None]:
        """Where the features are in each parameter; None where it has nothing to do with them."""
        return {name: dims.index("d_sae") if "d_sae" in dims else None for name, dims in cls.dims.items()}

    @classmethod
    def shapes(cls, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of an autoencoder."""
        sizes = {"d_in": d_in, "d_sae": d_sae, "d_out": d_in}
        return {name: tuple(sizes[dim] for dim in dims) for name, dims in cls.dims.items()}

    @classmethod
    def initial(
        cls,
        d_in: int,
        d_sae: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scale: float = 1.0,
        features: range | None = None,
        **hyperparameters: Any,
    ) -> Self:
        """Random decoder rows of one norm, W_enc its transpose, all else zero; float32.

        Drawn on the CPU, so that every device starts from the same bytes; on "meta" not at all. With `features`, a
        rank's part of it, which alone is held in memory.
        """
        features = range(d_sae) if features is None else features
        shapes = cls.shapes(d_in, len(features))
        if torch.device(device).type == "meta":
            empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            return cls(empty, scale, features.start, **hyperparameters)
        W_dec = _random_rows(d_in, d_sae, seed, features)
        W_dec *= cls.decoder_norm / W_dec.norm(dim=1, keepdim=True)
        drawn = {"W_enc": W_dec.t().contiguous(), "W_dec": W_dec}
        parameters = {name: drawn[name] if name in drawn else torch.zeros(shape) for name, shape in shapes.items()}
        return cls(parameters, scale, features.start, **hyperparameters).to(device)


def _random_rows(d_in: int, d_sae: int, seed: int, features: range) -> Tensor:
    """These rows of `randn(d_sae, d_in)`, without the others in memory."""
    generator, out = torch.Generator().manual_seed(seed), torch.empty(len(features), d_in)
    starts = [row for row in range(0, d_sae, DRAWN) if row == 0 or d_sae - row >= DRAWN_TOGETHER]
    for start, end in pairwise([*starts, d_sae]):
        if start >= features.stop:
            break
        rows = torch.randn(end - start, d_in, generator=generator)
        first, last = max(start, features.start), min(end, features.stop)
        if first < last:
            out[first - features.start : last - features.start] = rows[first - start : last - start]
    return out


def input_scale(d_in: int, mean_norm: float) -> float:
    """s = √d_in / mean‖x‖, so that scaled rows have norm √d_in on average.

    SAELens calls this `expected_average_only_in`; λ has its meaning only at this scale.
    """
    return math.sqrt(d_in) / mean_norm
