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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def no_interventions(hook: str) -> Interventions:
    """The model as it is, where there is no SAE; what passes the hook is counted all the same."""
    nothing: Any = None
    return Interventions(SavedSae(nothing, hook, nothing, {}), {}, [()])


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


@dataclass
class Reading:
    """How far a model has read an answer with its prompt, and what of it passed the hook."""

    operations: Sequence[Operation]  # those that change anything
    prompt: int  # its tokens
    tags: Tags | None = None  # needed for operations on thinking
    processed: int = 0  # positions that passed the hook
    changed: int = 0  # of these, where an operation was done
    thinking: bool = False  # whether the next token would be thought

    def read(self, tokens: Sequence[int]) -> list[list[bool]]:
        """Count further tokens; at which each operation is done.

        More than one is the text from its beginning: the prompt, or all of it where a model has no cache.
        """
        if len(tokens) > 1:
            self.processed, self.changed, self.thinking = 0, 0, False
        done: list[list[bool]] = [[] for _ in self.operations]
        start, end = self.tags or (None, None)
        for token in tokens:
            self.thinking = self.thinking and token != end
            generated = self.processed >= self.prompt
            here = {
                "all": True,
                "prompt": not generated,
                "generated": generated,
                "thinking": self.thinking and token != start,
            }
            for places, operation in zip(done, self.operations, strict=True):
                places.append(here[operation.where])
            self.processed += 1
            self.changed += any(places[-1] for places in done)
            self.thinking = self.thinking or token == start
        return done


class Operator:
    """Changes the activations of a pass over texts of several lists of operations (`HookedModel.changed`).

    The operations of a list are computed on all rows of the pass and kept in those of its own texts, so that a text's
    bits do not depend on how many others have its list.
    """

    def __init__(self, interventions: Interventions) -> None:
        self.sae, self.maxima = interventions.saved.sae, interventions.maxima
        self.expected: list[tuple[Reading, Sequence[int]] | None] = []

    def expect(self, rows: Sequence[tuple[Reading, Sequence[int]] | None]) -> None:
        """Say whose tokens the rows of the next pass are; None is nobody's."""
        self.expected = list(rows)

    def __call__(self, acts_BSD: Tensor, _ids_BS: Tensor) -> Tensor:
        """The activations (B, S, D) that take the place of those of a pass."""
        done: dict[tuple[Operation, ...], list[list[list[bool]]]] = {}  # [operation][row][position]
        for row, expected in enumerate(self.expected):
            if expected is None:
                continue
            reading, tokens = expected
            if key := tuple(reading.operations):
                nowhere = [[False] * len(tokens)] * len(self.expected)
                rows = done.setdefault(key, [list(nowhere) for _ in key])
                for places, each in zip(rows, reading.read(tokens), strict=True):
                    places[row] = each
            else:
                reading.read(tokens)
        x_ND = acts_BSD.flatten(0, 1)
        for operations, places in done.items():
            places_KN = torch.tensor(places, device=acts_BSD.device).flatten(1)
            x_ND = operated(self.sae, x_ND, operations, self.maxima, places_KN).to(x_ND.dtype)
        return x_ND.view(acts_BSD.shape)
