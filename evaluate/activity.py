"""What every feature does on the held-out rows, in one file of bounded size; pages are readers of it.

activity-<hook>.safetensors, for F features, G groups of contexts that do not overlap, C held-out contexts of S tokens
and windows of T tokens (metadata `about`, JSON: `groups`, the groups' names, and `window`, T). Activations are in the
SAE's own units; rows that training leaves out do not count.

    rows        int64 (G,)          rows counted
    active      int64 (G, F)        of these, rows that a feature fires in
    sum         float64 (G, F)      of its activations
    max         float32 (G, F)      largest activation
    histogram   int32 (F, 64)       active rows in 64 equal bins from 0 to `top`
    top         float32 (F,)        a power of two
    token       uint32 (F, 32)      tokens that it fires on, the most frequent first
    token_active, token_rows  int32 (F, 32)    rows of the token that it fires in (0: no token), and all of its rows
    token_sum   float32 (F, 32)     of its activations there
    token_total int64 (F,)          active rows that tokens were counted in
    strongest_{context,position}  int32 (F, N)    active tokens with the largest activations, one a context; -1: no more
    strongest_active   uint8 (F, N, ⌈T/8⌉)    a bit for each of the T tokens around (`window_start`), the highest first:
                                whether the feature fires at it
    strongest_acts     float32 (non-zeros,)    its activations there, by feature, excerpt, token
    strongest_begin    int64 (F + 1,)    where those of each feature begin
    sampled_...         the same for M active tokens drawn at random, by ascending draw
    tokens      uint32 (C, S)       the text
    kept        bool (C, S)         the rows that count
    group       int64 (C,)          of each context

N, M and T are as the settings ask, N and M fewer where the file would exceed `activity_bytes` if features fired at all
tokens around; they fire at a twentieth, so it is far smaller. Counts of tokens are exact until a feature's rare tokens
are dropped for memory. Where features fire too densely, tokens and excerpts come from a part of the contexts; the sums
never do. Ingested rows have no text: then G is 1 ("all"), and C, S, T, N and M are 0.

Shape suffixes: F, C, S and T as above, N excerpts of one feature.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from evaluate.config import FeaturesConfig
from harvest.files import UserError, replacing

BINS, TOKENS = 64, 32
LEFT_OUT = -1.0  # stands for the activation of a row that does not count; activations are never negative
SAMPLED = 64  # active tokens drawn at random, of which the examples of quarters are taken
SPARE = 3  # strongest excerpts kept for each that is shown: the same text may occur many times


class Room(NamedTuple):
    """What of each feature is kept."""

    strongest: int  # excerpts
    sampled: int
    bytes: int  # that the file has at most, but for its header
    wanted: tuple[int, int]  # excerpts, strongest and drawn, if there were room
    bytes_wanted: int


class Excerpts(NamedTuple):
    """Windows of contexts around active tokens of one feature, best first."""

    context_N: np.ndarray
    position_N: np.ndarray  # of the active token, within the context
    start_N: np.ndarray  # of the window, within the context
    token_NT: np.ndarray
    acts_NT: np.ndarray  # LEFT_OUT where the row does not count

    @property
    def value_N(self) -> np.ndarray:
        """Activation at the active token, float32 (N,)."""
        return np.take_along_axis(self.acts_NT, (self.position_N - self.start_N)[:, None], 1)[:, 0]


@dataclass(frozen=True)
class Activity:
    """The file's arrays, by their names there."""

    groups: list[str]
    arrays: dict[str, np.ndarray]
    window: int  # tokens of an excerpt

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by its name, of the shape that is told above."""
        return self.arrays[name]

    def largest(self, feature: int) -> float:
        """The largest activation of a feature, 0 for one that fires in no row."""
        return float(self["max"][:, feature].max())

    def excerpts(self, kind: str, feature: int) -> Excerpts:
        """ "strongest" or "sampled" excerpts of a feature."""
        used = self[f"{kind}_context"][feature] >= 0
        context_N, position_N = (self[f"{kind}_{name}"][feature][used] for name in ("context", "position"))
        acts_NT = self._unpacked(kind, feature)[used]
        start_N = window_start(position_N, acts_NT.shape[1], self["tokens"].shape[1])
        where = context_N[:, None], start_N[:, None] + np.arange(acts_NT.shape[1])
        acts_NT = np.where(self["kept"][where], acts_NT, np.float32(LEFT_OUT))
        return Excerpts(context_N, position_N, start_N, self["tokens"][where], acts_NT)

    def _unpacked(self, kind: str, feature: int) -> np.ndarray:
        active_NT = np.unpackbits(self[f"{kind}_active"][feature], axis=1, count=self.window).astype(bool)
        acts_NT = np.zeros(active_NT.shape, np.float32)
        acts_NT[active_NT] = self[f"{kind}_acts"][slice(*self[f"{kind}_begin"][feature : feature + 2])]
        return acts_NT


def write_activity(path: Path, activity: Activity) -> None:
    """Write the file whole or not at all."""
    about = json.dumps({"groups": activity.groups, "window": activity.window})
    with replacing(path) as partial:  # one key: the order of several is another each time
        safetensors.numpy.save_file(activity.arrays, partial, {"about": about})


def read_activity(path: Path) -> Activity:
    """The activity that an evaluation left.

    Raises UserError when the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["about"])
            return Activity(list(about["groups"]), arrays, int(about["window"]))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); `make eval` makes it anew") from None


def window_start(position_N: np.ndarray, tokens: int, size: int) -> np.ndarray:
    """First token of windows around active ones, (N,): three quarters lie before, as models look back."""
    return np.clip(position_N - tokens * 3 // 4, 0, size - tokens)


def room(d_sae: int, groups: int, text: tuple[int, ...], config: FeaturesConfig) -> Room:
    """How many excerpts of each feature fit the bound, for so many groups and a text of (contexts, tokens).

    Raises UserError where it is too low.
    """
    wanted = (config.contexts * SPARE, SAMPLED if config.samples else 0) if text[0] else (0, 0)
    tokens = min(config.tokens, text[1])
    each = d_sae * (8 + 4 * tokens + (tokens + 7) // 8)
    of_text = 8 * (groups + text[0]) + 5 * text[0] * text[1]
    fixed = d_sae * (20 * groups + 4 * BINS + 16 * TOKENS + 28) + of_text + 16
    fit = (config.activity_bytes - fixed) // each
    whole = fixed + each * sum(wanted)
    if fit >= sum(wanted):
        return Room(*wanted, whole, wanted, whole)
    if fit < 2:
        raise UserError(
            f"evaluate.features.activity_bytes: {config.activity_bytes:,}: {d_sae:,} features need at least "
            f"{fixed + 2 * each:,}; raise it, or lower evaluate.features.tokens"
        )
    strongest = max(1, fit * wanted[0] // sum(wanted))
    return Room(strongest, fit - strongest, fixed + each * fit, wanted, whole)
