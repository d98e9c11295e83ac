"""Short texts for token injection: cut from the second half of the held-out text, and with tokens put into them.

All are of one length, so that the largest activation of a text is taken of as many rows with injected tokens as
without. Texts begin as the sample's do: with a BOS where documents or contexts have one.

Shape suffixes: C contexts, S positions, B texts, W tokens of a text without BOS, G own n-grams, L tokens of one.
"""

from typing import NamedTuple

import numpy as np

STRATEGIES = ("prepend", "intersperse", "replace", "context")


class Injected(NamedTuple):
    """Texts with tokens put into them."""

    tokens_BW: np.ndarray
    is_injected_BW: np.ndarray  # bool


def windows(tokens_CS: np.ndarray, usable_CS: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Pieces of contexts in a random order, (B, W): side by side, and of usable tokens alone."""
    each = tokens_CS.shape[1] // width
    spare = tokens_CS.shape[1] - each * width  # a BOS would stand among the first
    tokens_BW, usable_BW = (values_CS[:, spare:].reshape(-1, width) for values_CS in (tokens_CS, usable_CS))
    return rng.permutation(tokens_BW[usable_BW.all(1)].astype(np.int64))


def inject(base_BW: np.ndarray, ngrams_GL: np.ndarray, strategy: str, count: int, rng: np.random.Generator) -> Injected:
    """Put `count` of a feature's tokens or n-grams into each text, fewer where half of it would not stay.

    prepend: at the start. replace: in the place of others. intersperse and context: between others, at random. What
    is put in moves the end of the text out. None is put in twice while there are others.
    """
    size, width, length = len(base_BW), base_BW.shape[1], ngrams_GL.shape[1]
    count = max(1, min(count, width // 2 // length))
    out = Injected(base_BW.copy(), np.zeros(base_BW.shape, bool))
    for b in range(size):
        rounds = -(-count // len(ngrams_GL))
        order = np.concatenate([rng.permutation(len(ngrams_GL)) for _ in range(rounds)])[:count]
        if strategy == "replace":
            at = rng.choice(width, count, replace=False)
        elif strategy == "prepend":
            at = np.arange(count * length)
        else:
            kept = width - count * length
            gaps = np.sort(rng.choice(kept + 1, min(count, kept + 1), replace=False))
            at = (gaps[:, None] + np.arange(count)[:, None] * length + np.arange(length)).reshape(-1)
        if strategy != "replace":
            rest = np.setdiff1d(np.arange(width), at)
            out.tokens_BW[b, rest] = base_BW[b, : len(rest)]
        out.tokens_BW[b, at] = ngrams_GL[order].reshape(-1)
        out.is_injected_BW[b, at] = True
    return out
