"""Which token is written next.

A sample is the argmax of logits / temperature + Gumbel noise, which is a draw from the softmax. The noise of a token is
a hash of the answer's seed, the step and the token's id: it depends on nothing else, and is computed only of tokens
that may be taken. So answers of one seed under several operations differ by the operations alone.

Shape suffixes: N answers, V vocabulary, C candidates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # of the likeliest tokens, those that make up this probability
    seed: int = 0


class Draw(NamedTuple):
    """Says which noise a token is drawn with."""

    seed: tuple[int, ...]  # of the answer
    step: int  # tokens that it has already


UNUSED = Draw((0,), 0)  # of rows without an answer, which are drawn beside the others
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def chosen(logits_NV: Tensor, sampling: Sampling, draws: Sequence[Draw | None]) -> list[int]:
    """The next token of each answer; of those without a draw it is of no meaning."""
    if not sampling.temperature:
        return logits_NV.float().argmax(1).tolist()
    log_NV = torch.log_softmax(logits_NV.float() / sampling.temperature, 1)
    if sampling.top_p == 1 and log_NV.is_cuda:
        keys = [noise_key(draw or UNUSED) for draw in draws]
        return (log_NV + gumbel_on_device(keys, log_NV.shape[1], log_NV.device)).argmax(1).tolist()
    if sampling.top_p == 1:
        every = np.arange(log_NV.shape[1])
        rows = zip(draws, log_NV.cpu().numpy(), strict=True)
        return [0 if draw is None else _drawn(every, log_V, 1, draw) for draw, log_V in rows]
    # Tokens of no more than this are in no nucleus: all of them together are no more than 1 - top_p.
    least = math.log((1 - sampling.top_p) / log_NV.shape[1])
    row_C, token_C = (log_NV > least).nonzero(as_tuple=True)
    log_C, token_C = log_NV[row_C, token_C].cpu().numpy(), token_C.cpu().numpy()
    first = np.searchsorted(row_C.cpu().numpy(), np.arange(len(draws) + 1))
    return [
        0 if draw is None else _drawn(token_C[a:b], log_C[a:b], sampling.top_p, draw)
        for draw, a, b in zip(draws, first[:-1], first[1:], strict=True)
    ]


def _drawn(token_C: np.ndarray, log_C: np.ndarray, top_p: float, draw: Draw) -> int:
    """One of the tokens, given in ascending order."""
    log_C = log_C.astype(np.float64)
    if top_p < 1:
        order = np.argsort(-log_C, kind="stable")
        token_C, log_C = token_C[order], log_C[order]
        p_C = np.exp(log_C)
        kept = max(1, int(np.count_nonzero(np.cumsum(p_C) - p_C < top_p)))
        token_C, log_C = token_C[:kept], log_C[:kept]
    return int(token_C[np.argmax(log_C + gumbel(draw, token_C))])


def noise_key(draw: Draw) -> np.uint64:
    """What sets a draw's noise apart."""
    return np.random.SeedSequence((*draw.seed, draw.step)).generate_state(1, np.uint64)[0]


def gumbel(draw: Draw, token_C: np.ndarray) -> np.ndarray:
    """The noise of tokens, float64: SplitMix64 (Steele et al. 2014) at the token's place in a stream of its own."""
    z_C = noise_key(draw) + (token_C.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    for shift, factor in MIX:
        z_C = (z_C ^ (z_C >> np.uint64(shift))) * np.uint64(factor)
    z_C ^= z_C >> np.uint64(31)
    uniform_C = ((z_C >> np.uint64(11)) + 0.5) * 2.0**-53  # within 0 and 1, neither of them
    return -np.log(-np.log(uniform_C))


def gumbel_on_device(keys: Sequence[np.uint64], vocabulary: int, device: torch.device) -> Tensor:
    """`gumbel` of all tokens for several draws, (N, V) float64, equal but for the last bits of a logarithm.

    On the host 60 draws from 128,256 tokens take 0.23 s (machine A of benchmarks/results.md, 2026-11-28).
    """

    def signed(number: int | np.uint64) -> int:
        return int(np.uint64(number).astype(np.int64))  # torch multiplies int64 alone; products wrap alike

    def shifted(z_NV: Tensor, by: int) -> Tensor:
        return (z_NV >> by) & ((1 << (64 - by)) - 1)  # torch's shift copies the sign

    key_N = torch.tensor([signed(key) for key in keys], device=device)
    z_NV = key_N.unsqueeze(1) + torch.arange(1, vocabulary + 1, device=device) * signed(GOLDEN)
    for shift, factor in MIX:
        z_NV = (z_NV ^ shifted(z_NV, shift)) * signed(factor)
    z_NV = z_NV ^ shifted(z_NV, 31)
    uniform_NV = (shifted(z_NV, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform_NV))
