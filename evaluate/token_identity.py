"""What tokens alone say of every feature, from the stored rows: how often it fires on its own tokens, in each source,
and the share of its activation that the token at the row explains.

A feature's own tokens are those at which it fires most above its base rate on the first half of the held-out text
(evaluate/halves.py); how often it fires on them is counted on the second half, so that chance favours no source. For
a tokens' rows n, active ones a, and the feature's base rate p the excess is (a − n·p) / (n + 4): the rate above p,
drawn towards 0 where there are few rows.

    η² = (Σ_t n_t·mean_t² − N·mean²) / Σ (f − mean)²      over all N kept held-out rows, zeros included
    ε² = 1 − (1 − η²)·(N − 1) / (N − K)                   K different tokens

η² of a feature that has nothing to do with tokens is (K − 1)/(N − 1), as every rare token explains its own rows; ε²
is 0 there on average, whatever the feature's distribution (Kelley 1935).

Memory: `PAIRS` triples of feature, token and half of a source. Shape suffixes: B rows of a batch, C contexts, S
positions, F d_sae, G halves of sources, V vocabulary, N pairs, T own tokens of a feature, H sources.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluate.activity_sums import first_of_each, nonzeros
from evaluate.halves import second_half
from evaluate.subject import Encoded, Subject
from harvest.files import UserError, replacing

TOKENS = 10  # own tokens of a feature, at most
PRIOR = 4  # rows at the base rate that are added to those of a token
LEAST = 0.5  # of the excess of a feature's best token, that others need
PAIRS = 1 << 25  # 24 bytes each
PENDING = 1 << 22  # non-zeros that are counted together


class TokenIdentity(NamedTuple):
    """What token_identity-<hook>.npz holds. NaN is: no such row, or a feature that never fires."""

    sources: np.ndarray  # names, (H,)
    reasoning: np.ndarray  # bool (H,): those inside
    explained: np.ndarray  # ε², float64 (F,)
    eta_squared: np.ndarray  # float64 (F,)
    token: np.ndarray  # own tokens, int64 (F, T), the one of the largest excess first; -1: no more
    active: np.ndarray  # int64 (F, T, H): rows of the second half with the token that the feature fires in
    rows: np.ndarray  # int64 (F, T, H): all of its rows there; active / rows is P(fires | token, source)
    inside: np.ndarray  # float64 (F,): part of the rows of all own tokens in reasoning sources that it fires in
    outside: np.ndarray  # float64 (F,): the same in the other sources

    def of(self, feature: int) -> dict[str, float | None]:
        """What tables say of a feature."""
        of_all = {"explained": self.explained, "own_inside": self.inside, "own_outside": self.outside}
        named = {name: float(value_F[feature]) for name, value_F in of_all.items()}
        return {name: None if math.isnan(value) else value for name, value in named.items()}


class TokenSums:
    """Reads the kept rows of a split; its result is a `TokenIdentity`."""

    def __init__(self, d_sae: int, tokens_CS: np.ndarray, source_C: np.ndarray, second_CS: np.ndarray) -> None:
        """`source_C` is the index into the sources of each context, `second_CS` whether a token is in the second
        half."""
        self.d_sae, self.tokens = d_sae, int(tokens_CS.max()) + 1
        self.group_CS = 2 * source_C.astype(np.int64)[:, None] + second_CS
        self.groups = 2 * (int(source_C.max()) + 1)
        self.rows_GV = np.zeros((self.groups, self.tokens), np.int64)
        self.total_F, self.squares_F = np.zeros(d_sae), np.zeros(d_sae)
        self.pairs = [np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)]  # key, active rows, sum
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.dropped = False

    @classmethod
    def of(cls, subject: Subject) -> "TokenSums":
        """Of the held-out rows of an SAE."""
        contexts, count = subject.contexts, subject.contexts.count("holdout")
        tokens_CS, source_C = (contexts.read("holdout", name, 0, count) for name in ("tokens", "source"))
        return cls(subject.saved.sae.d_sae, tokens_CS, source_C, second_half(contexts, "holdout"))

    def add(self, batch: Encoded) -> None:
        """Count the rows of a batch."""
        rows = batch.rows
        cell_B = self.group_CS[rows.context, rows.position] * self.tokens + rows.token
        self.rows_GV += np.bincount(cell_B[rows.kept], minlength=self.rows_GV.size).reshape(self.rows_GV.shape)
        row_N, feature_N, value_N = nonzeros(batch.f_BF, rows.kept)
        value_N = value_N.astype(np.float64)
        self.total_F += np.bincount(feature_N, value_N, self.d_sae)
        self.squares_F += np.bincount(feature_N, value_N**2, self.d_sae)
        pair_N = feature_N * self.tokens + rows.token[row_N]
        self.pending.append((pair_N * self.groups + self.group_CS[rows.context[row_N], rows.position[row_N]], value_N))
        if sum(len(key_N) for key_N, _ in self.pending) > PENDING:
            self._merge()

    def _merge(self) -> None:
        if not self.pending:
            return
        key_N, value_N = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        new = (key_N, np.ones(len(key_N), np.int64), value_N)
        key_N, count_N, sum_N = (np.concatenate(both) for both in zip(self.pairs, new, strict=True))
        order = np.argsort(key_N, kind="stable")
        begins = _begins(key_N[order])
        self.pending = []
        self.pairs = [key_N[order][begins], *(np.add.reduceat(each[order], begins) for each in (count_N, sum_N))]
        if len(begins) > PAIRS:
            feature_N = self.pairs[0] // (self.tokens * self.groups)
            kept = np.sort(first_of_each(feature_N, -self.pairs[1], PAIRS // 2 // self.d_sae))
            self.pairs, self.dropped = [each[kept] for each in self.pairs], True

    def result(self, sources: list[str], reasoning: list[int]) -> TokenIdentity:
        """What tokens say of all features on the rows that were added; `reasoning` are indices of the sources inside.

        Says so where pairs had to be dropped: ε² and η² are lower bounds then, and rates may be too low.
        """
        self._merge()
        if self.dropped:
            print(f"token identity: more than {PAIRS:,} pairs; a feature's rarest tokens were dropped", flush=True)
        eta_F, epsilon_F = self._explained()
        token_FT = self._own_tokens()
        active_FTH, rows_FTH = self._tested(token_FT, len(sources))
        is_inside_H = np.isin(np.arange(len(sources)), reasoning)
        rates = [
            _ratio(active_FTH[..., chosen_H].sum((1, 2)), rows_FTH[..., chosen_H].sum((1, 2)))
            for chosen_H in (is_inside_H, ~is_inside_H)
        ]
        return TokenIdentity(np.array(sources), is_inside_H, epsilon_F, eta_F, token_FT, active_FTH, rows_FTH, *rates)

    def _explained(self) -> tuple[np.ndarray, np.ndarray]:
        """η² and ε² of all features, (F,)."""
        key_N, _, sum_N = self.pairs
        pair_N, rows_V = key_N // self.groups, self.rows_GV.sum(0)
        begins = _begins(pair_N)
        feature_N, token_N = np.divmod(pair_N[begins], self.tokens)
        sums = np.add.reduceat(sum_N, begins) if len(begins) else sum_N
        rows, tokens = rows_V.sum(), (rows_V > 0).sum()
        of_mean_F = self.total_F**2 / max(1, rows)
        between_F = np.bincount(feature_N, sums**2 / rows_V[token_N], self.d_sae) - of_mean_F
        eta_F = _ratio(np.maximum(between_F, 0), np.where(self.total_F > 0, self.squares_F - of_mean_F, 0))
        epsilon_F = 1 - (1 - eta_F) * _ratio(np.array(rows - 1), np.array(rows - tokens))
        return eta_F, epsilon_F

    def _own_tokens(self) -> np.ndarray:
        """Those of all features by the first half, int64 (F, T)."""
        key_N, count_N, _ = self.pairs
        first = key_N % 2 == 0
        pair_N, count_N = key_N[first] // self.groups, count_N[first]
        begins = _begins(pair_N)
        feature_N, token_N = np.divmod(pair_N[begins], self.tokens)
        count_N = np.add.reduceat(count_N, begins) if len(begins) else count_N
        rows_V = self.rows_GV[::2].sum(0)
        base_F = np.bincount(feature_N, count_N, self.d_sae) / max(1, rows_V.sum())
        chosen = own(feature_N, count_N, rows_V[token_N], base_F)
        token_FT = np.full((self.d_sae, TOKENS), -1)
        feature_N = feature_N[chosen]
        token_FT[feature_N, np.arange(len(chosen)) - np.searchsorted(feature_N, feature_N)] = token_N[chosen]
        return token_FT

    def _tested(self, token_FT: np.ndarray, sources: int) -> tuple[np.ndarray, np.ndarray]:
        """Active rows and all rows of tokens in the second half of each source, int64 (F, T, H) each."""
        key_N, count_N, _ = self.pairs
        group_H = np.arange(sources) * 2 + 1
        is_there_FT = token_FT >= 0
        rows_HV = np.zeros((sources, self.tokens), np.int64)
        rows_HV[: self.groups // 2] = self.rows_GV[1::2]
        rows_FTH = np.where(is_there_FT[..., None], rows_HV.T[token_FT], 0)
        pair_FT = np.arange(self.d_sae)[:, None] * self.tokens + token_FT
        wanted_FTH = pair_FT[..., None] * self.groups + group_H
        at_FTH = np.minimum(np.searchsorted(key_N, wanted_FTH), max(0, len(key_N) - 1))
        is_found_FTH = (rows_FTH > 0) & (key_N[at_FTH] == wanted_FTH if len(key_N) else False)
        return np.where(is_found_FTH, count_N[at_FTH] if len(key_N) else 0, 0), rows_FTH


def own(feature_N: np.ndarray, active_N: np.ndarray, rows_N: np.ndarray, base_F: np.ndarray) -> np.ndarray:
    """Indices into N, (G,), of the tokens or n-grams that are a feature's own: by feature, the largest excess first.

    Those are up to `TOKENS` whose excess is above 0 and at least `LEAST` of the best one's. Of equal ones the first
    comes first.
    """
    excess_N = excess(active_N, rows_N, base_F[feature_N])
    best = first_of_each(feature_N, -excess_N, TOKENS)
    top_F = np.zeros(len(base_F))
    np.maximum.at(top_F, feature_N, excess_N)
    return best[(excess_N[best] > 0) & (excess_N[best] >= LEAST * top_F[feature_N[best]])]


def excess(active_N: np.ndarray, rows_N: np.ndarray, base_N: np.ndarray) -> np.ndarray:
    """The rate above the base rate, drawn towards 0 where there are few rows, float64 (N,)."""
    return (active_N - rows_N * base_N) / (rows_N + PRIOR)


def write_identity(path: Path, identity: TokenIdentity) -> None:
    """Write the file whole or not at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **identity._asdict())


def read_identity(path: Path) -> TokenIdentity | None:
    """What an evaluation left; None where it was not computed.

    Raises UserError when the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return TokenIdentity(**{name: arrays[name] for name in TokenIdentity._fields})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); `make eval` makes it anew") from None


def _begins(key_N: np.ndarray) -> np.ndarray:
    """Where each of the ascending keys begins."""
    return np.flatnonzero(np.diff(key_N, prepend=-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
