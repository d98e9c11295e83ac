"""Makes the activity of all features (evaluate/activity.py) from the held-out rows, in one pass.

Memory: `activity_bytes`, a shard's non-zeros (up to `NONZEROS`), and `PAIRS`.

Shape suffixes: F d_sae, G groups, C contexts, S tokens of one, T tokens of a window, B rows of a batch or bins, N
non-zeros, pairs or excerpts, M activations in windows, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from evaluate.activity import BINS, TOKENS, Activity, room, window_start
from evaluate.config import FeaturesConfig
from evaluate.subject import Encoded

NONZEROS = 1 << 25  # of a shard that excerpts are taken from, 12 bytes each
PAIRS = 1 << 24  # of feature and token, 24 bytes each
AT_ONCE = 1024  # features whose excerpts are merged together


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
        """`groups` are names, and the index into them of each context, (C,); one group where there is no text.

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
        self.window = min(config.tokens, tokens_CS.shape[1])
        fits = room(d_sae, len(self.names), tokens_CS.shape, config)
        if (fits.strongest, fits.sampled) != fits.wanted:
            print(
                f"evaluate.features.activity_bytes: {fits.strongest} strongest and {fits.sampled} drawn excerpts of "
                f"each feature fit, of {fits.wanted[0]} and {fits.wanted[1]}",
                flush=True,
            )
        self.strongest = _Slots(d_sae, fits.strongest, self.window, tokens_CS.shape)
        self.sampled = _Slots(d_sae, fits.sampled, self.window, tokens_CS.shape)
        self.shard, self.contexts_used = 0, shard_contexts
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []  # keys (feature, then place in the text), activations

    def add(self, batch: Encoded) -> None:
        """Count the rows of a batch."""
        rows, size = batch.rows, self.tokens_CS.shape[1]
        row_N, feature_N, value_N = nonzeros(batch.f_BF, rows.kept)
        if not self.tokens_CS.size:
            self.arrays["rows"] += rows.kept.sum()
            self._count(np.zeros_like(row_N), feature_N, value_N)
            return
        self.arrays["kept"][rows.context, rows.position] = rows.kept
        self.arrays["rows"] += np.bincount(self.group_C[rows.context[rows.kept]], minlength=len(self.names))
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
        return Activity(self.names, self.arrays | slots | self._tokens(), self.window)

    def _tokens(self) -> dict[str, np.ndarray]:
        pair_N, count_N, sum_N = self.pairs
        first = first_of_each(pair_N >> 32, -count_N, TOKENS)
        feature_N, token_N = pair_N[first] >> 32, pair_N[first] & 0xFFFFFFFF
        place = feature_N, np.arange(len(first)) - np.searchsorted(feature_N, feature_N)
        rows_V = np.bincount(self.tokens_CS[self.arrays["kept"]], minlength=int(self.tokens_CS.max(initial=0)) + 1)
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
        active_FNT = self.acts_FNT != 0
        found = {
            "context": context.astype(np.int32),
            "position": np.where(used, position, -1).astype(np.int32),
            "active": np.packbits(active_FNT, axis=2),
            "acts": self.acts_FNT[active_FNT],
            "begin": np.concatenate([[0], active_FNT.sum((1, 2)).cumsum()]),
        }
        return {f"{kind}_{name}": array for name, array in found.items()}


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
