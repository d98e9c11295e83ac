"""Texts of any length as token ids, in parts that overlap.

`tokenizers` takes about 130 bytes of memory for each of text, 6.4 GB for 50 MB. A long text is therefore read in
parts of PART characters. Where two parts overlap, each is wrong near its cut end and right away from it. They are
joined in the middle of a stretch of tokens in which both agree, ids and places. Where there is none, the overlap
grows, and in the end the two parts become one. So the parts change no token.
"""

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

PART = 400_000  # characters
OVERLAP = 8_000
AGREEING = 32  # tokens on each side of a joint that must be equal


class _Part(NamedTuple):
    """Tokens of a piece of a text, with their places in the whole text."""

    first: int
    end: int
    ids: np.ndarray  # uint32 (tokens,)
    starts: np.ndarray  # int64 (tokens,)
    ends: np.ndarray


def encode_long(tokenizer: Tokenizer, text: str, size: int = PART, overlap: int = OVERLAP) -> np.ndarray:
    """Token ids, uint32 (tokens,), of a text: those of the text as one string, without special tokens around it."""
    done: list[np.ndarray] = []
    part, taken = _encoded(tokenizer, text, 0, size), 0  # tokens of the part that are in `done` already
    while part.end < len(text):
        found = _following(tokenizer, text, part, taken, size, overlap)
        if found is None:
            part = _encoded(tokenizer, text, part.first, part.end + size)
            continue
        following, here, there = found
        done.append(part.ids[taken:here])
        part, taken = following, there
    return np.concatenate([*done, part.ids[taken:]])


def _following(
    tokenizer: Tokenizer, text: str, part: _Part, taken: int, size: int, overlap: int
) -> tuple[_Part, int, int] | None:
    """The part after this one, and the token of each at which they are joined; None where they agree nowhere."""
    while True:
        # A part that starts where a token does falls into step at once, also within one letter a million times.
        k = int(np.searchsorted(part.starts, part.end - overlap))
        if k <= taken or k >= len(part.ids):
            return None
        first = int(part.starts[k])
        following = _encoded(tokenizer, text, first, part.end + size)
        for eighth in (4, 3, 5, 2, 6):
            place = first + (part.end - first) * eighth // 8
            here, there = (int(np.searchsorted(p.starts, place)) for p in (part, following))
            if here - AGREEING >= taken and there >= AGREEING and _agree(part, here, following, there):
                return following, here, there
        overlap *= 4


def _agree(a: _Part, i: int, b: _Part, j: int) -> bool:
    near_a, near_b = slice(i - AGREEING, i + AGREEING), slice(j - AGREEING, j + AGREEING)
    pairs = ((a.ids, b.ids), (a.starts, b.starts), (a.ends, b.ends))
    return all(np.array_equal(x[near_a], y[near_b]) for x, y in pairs) and i + AGREEING <= len(a.ids)


def _encoded(tokenizer: Tokenizer, text: str, first: int, end: int) -> _Part:
    encoding = tokenizer.encode(text[first:end], add_special_tokens=False)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + first
    return _Part(first, min(end, len(text)), np.array(encoding.ids, np.uint32), places[:, 0], places[:, 1])
