"""Operations on features, as one hook where the SAE reads: the activation x of a token becomes

    add      x + γ · max_i · direction_i            the formula of arXiv 2503.18878
    set      x + (γ · max_i − f_i) · direction_i    f_i becomes γ · max_i, as in its code
    ablate   x − f_i · direction_i                  f_i becomes 0
    scale    x + (γ · f_i − f_i) · direction_i      f_i becomes γ · f_i

γ is the strength, max_i the largest activation of feature i on the kept held-out rows, direction_i what a unit of it
adds to a row (W_dec,i / s). What the SAE does not rebuild of x stays as it is: the last three are decode(changed f) +
(x − decode(f)), without computing either. Operations of one list are on different features; all f are those of x
before any of them. Sums are float32, and rounded to the model's precision once; what `add` adds has that precision.

Shape suffixes: B sequences, S positions, K operations of a list, N rows, D d_in.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evaluate.config import AS_IT_IS, LARGEST_STRENGTH, Op, Where
from harvest.files import UserError
from train.checkpoint import SavedSae
from train.sae import Sae


class Operation(NamedTuple):
    """What is done to one feature."""

    feature: int
    op: Op
    strength: float  # γ; of no meaning to ablate
    where: Where = "all"


class Interventions(NamedTuple):
    """What is compared: lists of operations on the features of one SAE. Those of a list are done at once."""

    saved: SavedSae
    maxima: dict[int, float]  # feature -> its max_activation, of those that are added or set
    lists: Sequence[Sequence[Operation]]  # an empty one leaves the model as it is


class Tags(NamedTuple):
    """Ids of the tokens around what a model thinks."""

    start: int
    end: int


def check_operations(operations: Sequence[Operation], d_sae: int, setting: str) -> None:
    """Raise UserError for a feature that the SAE does not have or that comes twice, and for a strength beyond use."""
    features = [operation.feature for operation in operations]
    check_features(features, d_sae, setting)
    if twice := [feature for n, feature in enumerate(features) if feature in features[:n]]:
        raise UserError(f"{setting}: {twice[0]}: one list has two operations on this feature; give it one")
    check_strengths([operation.strength for operation in operations], setting)


def check_features(features: Sequence[int], d_sae: int, setting: str) -> None:
    """Raise UserError for a feature that the SAE does not have."""
    for feature in features:
        if not 0 <= feature < d_sae:
            raise UserError(f"{setting}: {feature}: the SAE has {d_sae:,} features, 0 to {d_sae - 1}")


def check_strengths(strengths: Sequence[float], setting: str) -> None:
    """Raise UserError for a strength that is NaN, infinite or beyond any use."""
    largest = LARGEST_STRENGTH
    for strength in strengths:
        if not abs(strength) <= largest:
            raise UserError(f"{setting}: {strength}: a strength is a number from -{largest:g} to {largest:g}")


def effective(operations: Sequence[Operation]) -> list[Operation]:
    """Those that change anything: adding 0 and scaling by 1 are left out, so that not even rounding is done."""
    return [operation for operation in operations if AS_IT_IS.get(operation.op) != operation.strength]


def operated(
    sae: Sae, x_ND: Tensor, operations: Sequence[Operation], maxima: dict[int, float], places_KN: Tensor
) -> Tensor:
    """Rows after the operations of one list, float32 (N, D); operation k is done where `places_KN` is true."""
    precision, x_ND = x_ND.dtype, x_ND.float()
    read = [operation.feature for operation in operations if operation.op != "add"]
    f = dict(zip(read, sae.columns(x_ND, read).unbind(1), strict=True)) if read else {}
    change_ND = torch.zeros_like(x_ND)
    for (feature, op, strength, _), place_N in zip(operations, places_KN, strict=True):
        (direction_D,) = sae.direction([feature])
        if op == "add":
            step_ND = (maxima[feature] * direction_D * strength).to(precision).float()
        else:
            was_N = f[feature]
            becomes = {"set": strength * maxima.get(feature, 0.0), "ablate": 0.0, "scale": strength * was_N}[op]
            step_ND = (becomes - was_N).unsqueeze(1) * direction_D
        change_ND += torch.where(place_N.unsqueeze(1), step_ND, 0)
    return torch.where(places_KN.any(0).unsqueeze(1), x_ND + change_ND, x_ND)


class Operator:
    """Changes the activations of a batch while it is generated, with a cache or without (`HookedModel.changed`).

    It keeps the token of every position that it has seen, by which it knows where it is. Padding on the left, and what
    a sequence gets after its end while others go on, is neither changed nor counted.
    """

    def __init__(
        self, interventions: Interventions, prompt_BS: Tensor, ends: Collection[int], tags: Tags | None = None
    ) -> None:
        """Sequence b has list b modulo their number. `prompt_BS` is true for a prompt's tokens and false for padding.

        `ends` are the tokens that end a sequence; `tags` are needed for operations on thinking.
        """
        self.sae, self.maxima = interventions.saved.sae, interventions.maxima
        self.lists = [effective(operations) for operations in interventions.lists]
        self.prompt_BS, self.tags = prompt_BS, tags
        self.ends = torch.tensor(sorted(ends), dtype=torch.long, device=prompt_BS.device)
        self.ids_BS = torch.empty(len(prompt_BS), 0, dtype=torch.long, device=prompt_BS.device)
        self.changed_BS = torch.empty_like(self.ids_BS, dtype=torch.bool)  # where any operation was done

    def __call__(self, acts_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        """The activations (B, S, D) that take the place of those of a pass over `ids_BS`."""
        seen = self.ids_BS.shape[1]
        first = 0 if ids_BS.shape[1] > seen else seen  # a model without a cache reads everything again
        self.ids_BS = torch.cat([self.ids_BS[:, :first], ids_BS], 1)
        places = {where: place_BS[:, first:] for where, place_BS in self.places().items()}
        changed_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        count, out_BSD = len(self.lists), acts_BSD.clone()
        for i, operations in enumerate(self.lists):
            if operations:
                places_KN = torch.stack([places[o.where][i::count].flatten() for o in operations])
                new_ND = operated(self.sae, acts_BSD[i::count].flatten(0, 1), operations, self.maxima, places_KN)
                out_BSD[i::count] = new_ND.view_as(acts_BSD[i::count]).to(acts_BSD)
                changed_BS[i::count] = places_KN.any(0).view_as(changed_BS[i::count])
        self.changed_BS = torch.cat([self.changed_BS[:, :first], changed_BS], 1)
        return out_BSD

    def places(self) -> dict[Where, Tensor]:
        """Where each kind of place is among the tokens seen, bool (B, S)."""
        count, width = self.ids_BS.shape[1], self.prompt_BS.shape[1]
        position_S = torch.arange(count, device=self.ids_BS.device)
        prompt_BS = torch.nn.functional.pad(self.prompt_BS[:, :count], (0, max(0, count - width)))
        written_BS = (position_S >= width).expand_as(self.ids_BS)
        is_end_BS = torch.isin(self.ids_BS, self.ends) & written_BS
        written_BS = written_BS & (is_end_BS.cumsum(1) == 0)
        places: dict[Where, Tensor] = {"all": prompt_BS | written_BS, "prompt": prompt_BS, "generated": written_BS}
        if self.tags:
            start_BS, end_BS = (
                torch.where(self.ids_BS == tag, position_S, -1).cummax(1).values for tag in self.tags
            )  # the last of each so far
            is_tag_BS = self.ids_BS == self.tags.start
            places["thinking"] = places["all"] & (start_BS > end_BS) & ~is_tag_BS
        return places

    def counts(self) -> list[tuple[int, int]]:
        """Of each sequence, the positions that passed the hook and those of them where an operation was done."""
        processed_B, changed_B = self.places()["all"].sum(1), self.changed_BS.sum(1)
        return list(zip(processed_B.tolist(), changed_B.tolist(), strict=True))
