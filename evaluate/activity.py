"""What every feature does on the held-out rows, in one file of bounded size; pages are readers of it.

activity-<hook>.safetensors, for F features, G groups of contexts that do not overlap (metadata `groups`: their names),
C held-out contexts of S tokens. Activations are in the SAE's own units; rows that training leaves out do not count.

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
    strongest_acts  float32 (F, N, T)    activations of the T tokens around each (see `window_start`)
    sampled_{context,position,acts}      the same for M active tokens drawn at random, by ascending draw
    tokens      uint32 (C, S)       the text
    kept        bool (C, S)         the rows that count
    group       int64 (C,)          of each context

N, M and T are as the settings ask, N and M fewer where `activity_bytes` would be exceeded. Counts of tokens are exact
until a feature's rare tokens are dropped for memory. Where features fire too densely, tokens and excerpts come from a
part of the contexts; the sums never do.

Memory: the file, and a shard's non-zeros (up to `NONZEROS`).

Shape suffixes: F, G, C, S and T as above, B rows of a batch or bins, N non-zeros, pairs or excerpts, M activations in
windows, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from torch import Tensor

from evaluate.config import FeaturesConfig
from evaluate.subject import Encoded
from harvest.files import UserError, replacing

BINS, TOKENS = 64, 32
LEFT_OUT = -1.0  # stands for the activation of a row that does not count; activations are never negative
SAMPLED = 64  # active tokens drawn at random, of which the examples of quarters are taken
SPARE = 3  # strongest excerpts kept for each that is shown: the same text may occur many times
NONZEROS = 1 << 25  # of a shard that excerpts are taken from, 12 bytes each
PAIRS = 1 << 24  # of feature and token, 24 bytes each
AT_ONCE = 1024  # features whose excerpts are merged together


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

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by its name, of the shape that is told above."""
        return self.arrays[name]

    def excerpts(self, kind: str, feature: int) -> Excerpts:
        """ "strongest" or "sampled" excerpts of a feature."""
        used = self[f"{kind}_context"][feature] >= 0
        context_N, position_N = (self[f"{kind}_{name}"][feature][used] for name in ("context", "position"))
        acts_NT = self[f"{kind}_acts"][feature][used]
        start_N = window_start(position_N, acts_NT.shape[1], self["tokens"].shape[1])
        where = context_N[:, None], start_N[:, None] + np.arange(acts_NT.shape[1])
        acts_NT = np.where(self["kept"][where], acts_NT, np.float32(LEFT_OUT))
        return Excerpts(context_N, position_N, start_N, self["tokens"][where], acts_NT)


def write_activity(path: Path, activity: Activity) -> None:
    """Write the file whole or not at all."""
    with replacing(path) as partial:
        safetensors.numpy.save_file(activity.arrays, partial, {"groups": json.dumps(activity.groups)})


def read_activity(path: Path) -> Activity:
    """The activity that an evaluation left.

    Raises UserError when the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Activity(json.loads(file.metadata()["groups"]), arrays)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); `make eval` makes it anew") from None


def window_start(position_N: np.ndarray, tokens: int, size: int) -> np.ndarray:
    """First token of windows around active ones, (N,): three quarters lie before, as models look back."""
    return np.clip(position_N - tokens * 3 // 4, 0, size - tokens)


class ActivitySums:
    """Reads the rows of a split in the order of its shards; its result is an `Activity`."""

    def __init__(
        self,
        d_sae: int,
        tokens_CS: np.ndarray,
        groups: tuple[list[str], np.ndarray],
        shard_contexts: int,
        config: FeaturesConfig,
    ) -> None:
        """`groups` are names, and the index into them of each context, (C,).

        Raises UserError where the bound is too low.
        """
        self.d_sae, self.tokens_CS, self.config = d_sae, tokens_CS, config
        (self.names, self.group_C), self.shard_contexts = groups, shard_contexts
        by_group = len(self.names), d_sae
        self.arrays = {
            "rows": np.zeros(len(self.names), np.int64),
            "active": np.zeros(by_group, np.int64),
            "sum": np.zeros(by_group),
            "max": np.zeros(by_group, np.float32),
            "histogram": np.zeros((d_sae, BINS), np.int32),
            "top": np.zeros(d_sae, np.float32),
            "token_total": np.zeros(d_sae, np.int64),
            "tokens": tokens_CS,
            "kept": np.zeros(tokens_CS.shape, bool),
            "group": self.group_C,
        }
        self.pairs: list[np.ndarray] = [np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)]
        tokens = min(config.tokens, tokens_CS.shape[1])
        strongest, sampled = self._fitting(tokens)
        self.strongest = _Slots(d_sae, strongest, tokens, tokens_CS.shape)
        self.sampled = _Slots(d_sae, sampled, tokens, tokens_CS.shape)
        self.shard, self.contexts_used = 0, shard_contexts
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []  # keys (feature, then place in the text), activations

    def _fitting(self, tokens: int) -> tuple[int, int]:
        """How many strongest and drawn excerpts of each feature fit the bound."""
        wanted = self.config.contexts * SPARE, SAMPLED if self.config.samples else 0
        each = self.d_sae * (8 + 4 * tokens)
        fixed = self.d_sae * (20 * len(self.names) + 4 * BINS + 16 * TOKENS + 12) + 5 * self.tokens_CS.size
        fit = (self.config.activity_bytes - fixed) // each
        if fit >= sum(wanted):
            return wanted
        if fit < 2:
            raise UserError(
                f"evaluate.features.activity_bytes: {self.config.activity_bytes:,}: {self.d_sae:,} features need at "
                f"least {fixed + 2 * each:,}; raise it, or lower evaluate.features.tokens"
            )
        strongest = max(1, fit * wanted[0] // sum(wanted))
        print(
            f"evaluate.features.activity_bytes: {strongest} strongest and {fit - strongest} drawn excerpts of each "
            f"feature fit, of {wanted[0]} and {wanted[1]}",
            flush=True,
        )
        return strongest, fit - strongest

    def add(self, batch: Encoded) -> None:
        """Count the rows of a batch."""
        rows, size = batch.rows, self.tokens_CS.shape[1]
        self.arrays["kept"][rows.context, rows.position] = rows.kept
        self.arrays["rows"] += np.bincount(self.group_C[rows.context[rows.kept]], minlength=len(self.names))
        row_N, feature_N, value_N = nonzeros(batch.f_BF, rows.kept)
        context_N = rows.context[row_N]
        self._count(self.group_C[context_N], feature_N, value_N)
        for part in np.unique(rows.context // self.shard_contexts):  # a batch may end one shard and begin the next
            if part > self.shard:
                self._end_shard()
                self.shard = part
            here = context_N // self.shard_contexts == part
            if not self.pending:  # the first batch says how dense the shard is
                dense = here.sum() / max(1, (rows.context // self.shard_contexts == part).sum()) * size
                self.contexts_used = max(1, min(self.shard_contexts, int(NONZEROS / max(1, dense))))
            here &= context_N % self.shard_contexts < self.contexts_used
            place_N = context_N[here] * size + rows.position[row_N[here]]
            self.pending.append((feature_N[here] * self.tokens_CS.size + place_N, value_N[here]))

    def _count(self, group_N: np.ndarray, feature_N: np.ndarray, value_N: np.ndarray) -> None:
        active_GF, sum_GF, max_GF, histogram_FB, top_F = (
            self.arrays[name] for name in ("active", "sum", "max", "histogram", "top")
        )
        at_N = group_N * self.d_sae + feature_N
        active_GF += np.bincount(at_N, minlength=active_GF.size).reshape(active_GF.shape)
        sum_GF += np.bincount(at_N, value_N, sum_GF.size).reshape(sum_GF.shape)
        np.maximum.at(max_GF.reshape(-1), at_N, value_N)
        _widen(histogram_FB, top_F, max_GF.max(0))
        bin_N = np.minimum((value_N / top_F[feature_N] * BINS).astype(np.int64), BINS - 1)
        np.add.at(histogram_FB.reshape(-1), feature_N * BINS + bin_N, 1)

    def _end_shard(self) -> None:
        """Take tokens and excerpts from the contexts of a shard, which are whole now."""
        if not self.pending:
            return
        key_N, value_N = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        self.pending = []
        order = np.argsort(key_N)
        key_N, value_N = key_N[order], value_N[order]
        feature_N, place_N = np.divmod(key_N, self.tokens_CS.size)
        self._count_tokens(feature_N, self.tokens_CS.reshape(-1)[place_N], value_N)
        for first in range(0, self.d_sae, AT_ONCE):
            here = slice(*np.searchsorted(feature_N, [first, first + AT_ONCE]))
            found = _Found(key_N[here], feature_N[here], place_N[here], value_N[here])
            self.strongest.offer(first, found, found.peaks(self.tokens_CS.shape[1]), -found.value_N)
            self.sampled.offer(first, found, np.arange(len(found.key_N)), _draws(found.key_N, self.config.seed))

    def _count_tokens(self, feature_N: np.ndarray, token_N: np.ndarray, value_N: np.ndarray) -> None:
        self.arrays["token_total"] += np.bincount(feature_N, minlength=self.d_sae)
        pair_N = np.concatenate([self.pairs[0], feature_N << 32 | token_N])
        pairs, index_N = np.unique(pair_N, return_inverse=True)
        counts = np.bincount(index_N, np.concatenate([self.pairs[1], np.ones_like(feature_N)])).astype(np.int64)
        sums = np.bincount(index_N, np.concatenate([self.pairs[2], value_N]))
        if len(pairs) > PAIRS:
            kept = np.sort(first_of_each(pairs >> 32, -counts, max(TOKENS, PAIRS // 2 // self.d_sae)))
            pairs, counts, sums = pairs[kept], counts[kept], sums[kept]
        self.pairs = [pairs, counts, sums]

    def result(self) -> Activity:
        """What all features did on the rows that were added."""
        self._end_shard()
        slots = self.strongest.arrays("strongest") | self.sampled.arrays("sampled")
        return Activity(self.names, self.arrays | slots | self._tokens())

    def _tokens(self) -> dict[str, np.ndarray]:
        pair_N, count_N, sum_N = self.pairs
        first = first_of_each(pair_N >> 32, -count_N, TOKENS)
        feature_N, token_N = pair_N[first] >> 32, pair_N[first] & 0xFFFFFFFF
        place = feature_N, np.arange(len(first)) - np.searchsorted(feature_N, feature_N)
        rows_V = np.bincount(self.tokens_CS[self.arrays["kept"]], minlength=int(self.tokens_CS.max()) + 1)
        out = {}
        for name, values, dtype in (
            ("token", token_N, np.uint32),
            ("token_active", count_N[first], np.int32),
            ("token_rows", rows_V[token_N], np.int32),
            ("token_sum", sum_N[first], np.float32),
        ):
            out[name] = np.zeros((self.d_sae, TOKENS), dtype)
            out[name][place] = values
        return out


class _Found(NamedTuple):
    """Non-zeros of some features on whole contexts, sorted by key."""

    key_N: np.ndarray  # feature x tokens of the text + place
    feature_N: np.ndarray
    place_N: np.ndarray
    value_N: np.ndarray

    def peaks(self, size: int) -> np.ndarray:
        """Indices of the largest of each feature in each context of `size` tokens, the first of equal ones."""
        context_N = self.key_N // size  # feature and context in one number
        begins = np.flatnonzero(np.diff(context_N, prepend=-1))
        if not len(begins):
            return begins
        peak_N = np.repeat(np.maximum.reduceat(self.value_N, begins), np.diff(begins, append=len(context_N)))
        at = np.flatnonzero(self.value_N == peak_N)
        return at[np.diff(context_N[at], prepend=-1) != 0]

    def windows(self, chosen_N: np.ndarray, tokens: int, size: int) -> np.ndarray:
        """Activations of the tokens around each of these non-zeros, float32 (N, T)."""
        position_N = self.place_N[chosen_N] % size
        begin_N = self.key_N[chosen_N] - position_N + window_start(position_N, tokens, size)
        low_N, high_N = np.searchsorted(self.key_N, begin_N), np.searchsorted(self.key_N, begin_N + tokens)
        count_N = high_N - low_N
        row_M = np.repeat(np.arange(len(chosen_N)), count_N)
        at_M = np.arange(len(row_M)) - np.repeat(count_N.cumsum() - count_N - low_N, count_N)
        acts_NT = np.zeros((len(chosen_N), tokens), np.float32)
        acts_NT[row_M, self.key_N[at_M] - begin_N[row_M]] = self.value_N[at_M]
        return acts_NT


class _Slots:
    """The excerpts of least keys of every feature."""

    def __init__(self, d_sae: int, count: int, tokens: int, shape: tuple[int, ...]) -> None:
        self.size = shape[1]
        self.key_FN = np.full((d_sae, count), np.inf)
        self.place_FN = np.full((d_sae, count), -1, np.int64)
        self.acts_FNT = np.zeros((d_sae, count, tokens), np.float32)

    def offer(self, first: int, found: _Found, at: np.ndarray, key_N: np.ndarray) -> None:
        """Keep those of `found` at these indices whose keys are among the least; of equal ones the earlier stays."""
        here = slice(first, first + AT_ONCE)
        old_FN = self.key_FN[here]
        features, count = old_FN.shape
        if not count:
            return
        at = at[key_N[at] < old_FN[found.feature_N[at] - first, -1]]
        at = at[first_of_each(found.feature_N[at], key_N[at], count)]
        feature_N = found.feature_N[at] - first
        where = feature_N, np.arange(len(at)) - np.searchsorted(feature_N, feature_N)
        new_FN, place_FN = np.full((features, count), np.inf), np.full((features, count), -1, np.int64)
        acts_FNT = np.zeros((features, *self.acts_FNT.shape[1:]), np.float32)
        new_FN[where], place_FN[where] = key_N[at], found.place_N[at]
        acts_FNT[where] = found.windows(at, acts_FNT.shape[2], self.size)
        order = np.concatenate([old_FN, new_FN], 1).argsort(1, kind="stable")[:, :count]
        for kept, new in ((self.key_FN, new_FN), (self.place_FN, place_FN), (self.acts_FNT, acts_FNT)):
            both = np.concatenate([kept[here], new], 1)
            kept[here] = np.take_along_axis(both, order.reshape(order.shape + (1,) * (both.ndim - 2)), 1)

    def arrays(self, kind: str) -> dict[str, np.ndarray]:
        used = self.place_FN >= 0
        context, position = np.divmod(self.place_FN, self.size)
        places = {"context": context, "position": np.where(used, position, -1)}
        return {f"{kind}_{name}": v.astype(np.int32) for name, v in places.items()} | {f"{kind}_acts": self.acts_FNT}


def nonzeros(f_BF: Tensor, kept_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, feature and value of the active entries of kept rows, (N,) each."""
    row, feature = f_BF.nonzero(as_tuple=True)
    row_N, feature_N, value_N = (each.cpu().numpy() for each in (row, feature, f_BF[row, feature]))
    kept_N = kept_B[row_N]
    return row_N[kept_N], feature_N[kept_N], value_N[kept_N]


def first_of_each(feature_N: np.ndarray, key_N: np.ndarray, limit: int) -> np.ndarray:
    """Indices (N,) of the `limit` least keys of each feature, by feature, then key; of equal keys the first comes
    first."""
    order = np.lexsort((key_N, feature_N))
    sorted_N = feature_N[order]
    rank_N = np.arange(len(order)) - np.searchsorted(sorted_N, sorted_N)
    return order[rank_N < limit]


def _draws(key_N: np.ndarray, seed: int) -> np.ndarray:
    """A number of each key that looks random (splitmix64): the least of them are a sample, whatever the order."""
    x = key_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))).astype(np.float64)


def _widen(histogram_FB: np.ndarray, top_F: np.ndarray, peak_F: np.ndarray) -> None:
    """Double the range of histograms until it holds the peaks; pairs of bins become one, so that counts stay exact."""
    new = (top_F == 0) & (peak_F > 0)
    top_F[new] = np.exp2(np.ceil(np.log2(peak_F[new])))
    while (small := peak_F > top_F).any():
        pairs = histogram_FB[small].reshape(-1, BINS // 2, 2).sum(2)
        histogram_FB[small] = np.concatenate([pairs, np.zeros_like(pairs)], 1)
        top_F[small] *= 2
