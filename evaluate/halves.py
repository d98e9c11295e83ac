"""Two halves of the text of every source: what is found on the first is tested on the second.

No document is in both. The documents of a source are sorted by how they begin, which makes those of one prompt
neighbours, and the list is cut where half of the tokens are: one prompt at most is on both sides.

Shape suffixes: C contexts, S positions, N tokens.
"""

import numpy as np

from harvest.contexts import Contexts

BEGINNING = 64  # tokens of a document that it is sorted by


def second_half(contexts: Contexts, split: str) -> np.ndarray:
    """Bool (contexts, context_size): the tokens of a split whose documents are in the second half of their source."""
    count = contexts.count(split)
    tokens_CS, document_CS = (contexts.read(split, name, 0, count) for name in ("tokens", "document"))
    source_C = contexts.read(split, "source", 0, count)
    second_CS = np.zeros(tokens_CS.shape, bool)
    for source in np.unique(source_C):
        here = source_C == source
        second_CS[here] = _second_half(tokens_CS[here], document_CS[here])
    return second_CS


def _second_half(tokens_CS: np.ndarray, document_CS: np.ndarray) -> np.ndarray:
    """Of the contexts of one source, which are in any order."""
    begins_CS = np.diff(document_CS.astype(np.int64), axis=1, prepend=-1) != 0
    beginnings: dict[int, list[int]] = {}
    for context, position in zip(*np.nonzero(begins_CS), strict=True):
        document = int(document_CS[context, position])
        # What begins a context may be the rest of a document that began in another one.
        if position or document not in beginnings:
            piece = document_CS[context, position : position + BEGINNING] == document
            beginnings[document] = tokens_CS[context, position : position + BEGINNING][piece].tolist()
    documents, size_N = np.unique(document_CS, return_counts=True)
    order = sorted(range(len(documents)), key=lambda n: (beginnings[int(documents[n])], n))
    middle_N = size_N[order].cumsum() - size_N[order] / 2
    return np.isin(document_CS, documents[order][middle_N >= size_N.sum() / 2])
