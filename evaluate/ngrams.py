"""The tokens and n-grams at which features fire most above their base rate, on the first half of the held-out text.

An n-gram ends at the row and lies within a document. The excess that ranks them is that of evaluate/token_identity.py.
Of `LENGTHS` a feature's is the longest whose n-grams exceed the base rate at least half as much as those of the best
length: a longer one holds what shorter ones hold, but there are fewer rows to know it by.

Shape suffixes: B rows of a batch, D d_in, K features, C contexts, S positions, N rows or n-grams, G own n-grams of a
feature, L tokens of one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from evaluate.halves import second_half
from evaluate.subject import Subject
from evaluate.token_identity import LEAST, excess, own
from harvest.activation_rows import stored_rows

LENGTHS = (2, 3, 4)  # of a feature's n-grams; 4 reach three tokens back


class Own(NamedTuple):
    """Of one feature; both empty where it fires on no row that they are chosen from."""

    tokens_GL: np.ndarray  # int64 (G, 1)
    ngrams_GL: np.ndarray  # int64 (G, n)


class Fired(NamedTuple):
    """The rows of the first half of the text, and where features fire."""

    tokens_CS: np.ndarray
    document_CS: np.ndarray
    counted_CS: np.ndarray  # bool: kept, and of the first half
    fires_KCS: np.ndarray  # bool


def fired(subject: Subject, features: Sequence[int]) -> Fired:
    """Where these features fire, from one reading of the stored held-out rows."""
    contexts, count, g = subject.contexts, subject.contexts.count("holdout"), subject.store.geometry
    tokens_CS, document_CS = (contexts.read("holdout", name, 0, count) for name in ("tokens", "document"))
    counted_CS = np.zeros(tokens_CS.shape, bool)
    fires_KCS = np.zeros((len(features), *tokens_CS.shape), bool)
    rows = stored_rows(subject.store, "holdout", subject.rules, subject.config.batch_rows, contexts=contexts)
    for batch in subject.counted(rows, "n-grams", g.holdout_shards * g.shard_rows):
        x_BD = batch.acts[subject.saved.hook].to(subject.device).float()
        with torch.inference_mode():
            fires_BK = (subject.saved.sae.columns(x_BD, features) > 0).cpu().numpy()
        counted_CS[batch.context, batch.position] = batch.kept
        fires_KCS[:, batch.context, batch.position] = fires_BK.T
    return Fired(tokens_CS.astype(np.int64), document_CS, counted_CS & ~second_half(contexts, "holdout"), fires_KCS)


def own_ngrams(found: Fired) -> list[Own]:
    """The own tokens and n-grams of each feature."""
    fires_KN = found.fires_KCS[:, found.counted_CS]
    base_K = fires_KN.mean(1) if fires_KN.size else np.zeros(len(fires_KN))
    by_length = {length: _of_length(found, length, base_K) for length in (1, *LENGTHS)}
    out = []
    for k in range(len(fires_KN)):
        most = max(by_length[length][k][1] for length in LENGTHS)
        longest = max(length for length in LENGTHS if by_length[length][k][1] >= LEAST * most)
        out.append(Own(by_length[1][k][0], by_length[longest][k][0]))
    return out


def _of_length(found: Fired, length: int, base_K: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Own n-grams of each feature, (G, L), and their mean excess."""
    code_CS, is_whole_CS = found.tokens_CS, found.counted_CS.copy()
    vocabulary = int(found.tokens_CS.max()) + 1
    for back in range(1, length):
        longer_CS = np.zeros_like(code_CS)
        longer_CS[:, 1:] = code_CS[:, :-1] * vocabulary + found.tokens_CS[:, 1:]
        code_CS = np.unique(longer_CS, return_inverse=True)[1].reshape(code_CS.shape)
        is_whole_CS[:, :back] = False
        is_whole_CS[:, back:] &= found.document_CS[:, back:] == found.document_CS[:, :-back]
    _, first_N, code_N, rows_N = np.unique(
        code_CS[is_whole_CS], return_index=True, return_inverse=True, return_counts=True
    )
    context_N, position_N = (at[first_N] for at in np.nonzero(is_whole_CS))
    ngrams_NL = found.tokens_CS[context_N[:, None], position_N[:, None] + np.arange(1 - length, 1)]
    out = []
    for base, fires_CS in zip(base_K, found.fires_KCS, strict=True):
        active_N = np.bincount(code_N[fires_CS[is_whole_CS]], minlength=len(rows_N))
        at = np.flatnonzero(active_N)
        chosen = at[own(np.zeros(len(at), np.int64), active_N[at], rows_N[at], np.array([base]))]
        above_G = excess(active_N[chosen], rows_N[chosen], np.full(len(chosen), base))
        out.append((ngrams_NL[chosen], float(above_G.mean()) if len(chosen) else 0.0))
    return out
