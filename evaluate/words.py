"""Words in tokens: where those of a vocabulary occur, and which are typical of some text.

Shape suffixes: C contexts, S positions of a context, W words.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluate.spellings import spellings, word_name
from harvest.tokenizer import SegmentTokenizer

Groups = dict[str, list[tuple[int, ...]]]  # a word's name -> token ids of each of its spellings
WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")
PRIOR_WORDS = 1000  # weight of the prior of `overrepresented`


class Found(NamedTuple):
    """Where words occur in some contexts."""

    inside_WCS: np.ndarray  # bool: the token belongs to a match of the word, or to its window
    matches_WC: np.ndarray  # int64: how often the word occurs in each context


def word_groups(words: Sequence[str], tokenizer: SegmentTokenizer) -> Groups:
    """Token sequences by word. A spelling of several tokens is matched as their sequence, as the paper's code does."""
    groups: Groups = {}
    for entry in words:
        name = word_name(entry)
        for text in spellings(entry):
            ids = tuple(tokenizer.encode_text(text))
            group = groups.setdefault(name, [])
            if ids and ids not in group:
                group.append(ids)
    return groups


def find_words(tokens_CS: np.ndarray, groups: Groups, window: tuple[int, int]) -> Found:
    """Matches of each word and their windows of tokens before and after, cut at the ends of a context."""
    contexts, size = tokens_CS.shape
    inside_WCS = np.zeros((len(groups), contexts, size), bool)
    matches_WC = np.zeros((len(groups), contexts), np.int64)
    before, after = window
    for w, sequences in enumerate(groups.values()):
        end_CS = np.zeros((contexts, size), bool)  # "wait" may be the last tokens of " wait": one match, not two
        for ids in sequences:
            starts = size - len(ids) + 1
            if starts < 1:
                continue
            match_CS = np.ones((contexts, starts), bool)
            for k, token in enumerate(ids):
                match_CS &= tokens_CS[:, k : k + starts] == token
            end_CS[:, len(ids) - 1 :] |= match_CS
            context, start = np.nonzero(match_CS)
            for offset in range(-before, len(ids) + after):
                at = start + offset
                real = (at >= 0) & (at < size)
                inside_WCS[w, context[real], at[real]] = True
        matches_WC[w] = end_CS.sum(1)
    return Found(inside_WCS, matches_WC)


def overrepresented(here: Sequence[str], elsewhere: Sequence[str], count: int = 30) -> list[dict[str, Any]]:
    """Words that are typical of some texts against others, most typical first.

    z-scores of log-odds with a Dirichlet prior of the words of both together (Monroe, Colaresi and Quinn 2008,
    "Fightin' Words", equations 15, 20 to 22).
    """
    a, b = (Counter(word.lower() for text in texts for word in WORD.findall(text)) for texts in (here, elsewhere))
    words = [word for word in a if a[word] >= 5]
    n_a, n_b = a.total(), b.total()
    if not words or not n_b:
        return []
    y_a, y_b = (np.array([counts[word] for word in words], float) for counts in (a, b))
    prior = PRIOR_WORDS * (y_a + y_b) / (n_a + n_b)
    odds = [
        np.log((y + prior) / (n + PRIOR_WORDS - y - prior)) for y, n in ((y_a, n_a), (y_b, n_b))
    ]  # fmt: skip
    z = (odds[0] - odds[1]) / np.sqrt(1 / (y_a + prior) + 1 / (y_b + prior))
    best = [i for i in np.argsort(-z, kind="stable")[:count] if z[i] > 0]
    return [
        {
            "word": words[i],
            "z": float(z[i]),
            "per_million": float(1e6 * y_a[i] / n_a),
            "per_million_elsewhere": float(1e6 * y_b[i] / n_b),
        }
        for i in best
    ]
