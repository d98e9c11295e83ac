"""Texts of any length as token ids, in parts that overlap.

`tokenizers` takes about 130 bytes of memory for each of text, 6.4 GB for 50 MB. A long text is therefore read in
parts of PART characters. Where two parts overlap, each is wrong near its cut end and right away from it. They are
joined in the middle of a stretch of tokens in which both agree, ids and places. Where there is none, the overlap
grows, and in the end the two parts become one. So the parts change no token.
"""

import numpy as np
from tokenizers import Tokenizer

PART = 400_000  # characters
OVERLAP = 8_000
AGREEING = 32  # tokens on each side of a joint that must be equal


def encode_long(tokenizer: Tokenizer, text: str, size: int = PART, overlap: int = OVERLAP) -> np.ndarray:
    """Token ids, uint32 (tokens,), of a text: those of the text as one string, without special tokens around it."""
    done: list[np.ndarray] = []
    first, end, taken = 0, size, 0  # `taken` tokens of the part are in `done` already
    part = _encoded(tokenizer, text, first, end)
    while end < len(text):
        found = _following(tokenizer, text, part, end, taken, size, overlap)
        end += size
        if found is None:
            part = _encoded(tokenizer, text, first, end)
        else:
            following, here, there = found
            done.append(part[taken:here, 0])
            first, part, taken = int(following[0, 1]), following, there
    return np.concatenate([*done, part[taken:, 0]]).astype(np.uint32)


def _following(
    tokenizer: Tokenizer, text: str, part: np.ndarray, end: int, taken: int, size: int, overlap: int
) -> tuple[np.ndarray, int, int] | None:
    """The part after this one, and the token of each at which they are joined; None where they agree nowhere."""
    while True:
        # A part that starts where a token does falls into step at once, also within one letter a million times.
        k = int(np.searchsorted(part[:, 1], end - overlap))
        if k <= taken or k >= len(part):
            return None
        first = int(part[k, 1])
        following = _encoded(tokenizer, text, first, end + size)
        for eighth in (4, 3, 5, 2, 6):
            place = first + (end - first) * eighth // 8
            here, there = (int(np.searchsorted(p[:, 1], place)) for p in (part, following))
            if here - AGREEING < taken or there < AGREEING or here + AGREEING > len(part):
                continue
            near, same = part[here - AGREEING : here + AGREEING], following[there - AGREEING : there + AGREEING]
            if np.array_equal(near, same):
                return following, here, there
        overlap *= 4


def _encoded(tokenizer: Tokenizer, text: str, first: int, end: int) -> np.ndarray:
    """Id, start and end in the whole text of each token of a part, int64 (tokens, 3)."""
    encoding = tokenizer.encode(text[first:end], add_special_tokens=False)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + first
    return np.column_stack([np.array(encoding.ids, np.int64), places])
