"""What a small card of a feature shows: a line of the table, what it promotes, and its strongest contexts."""

from typing import Any

import numpy as np

from pipeline.explore.catalog import Shelf

CONTEXTS = 3


def card(shelf: Shelf, feature: int) -> dict[str, Any]:
    """Figures and texts of a feature. Raises UserError for a number that the SAE does not have."""
    view, excerpts = shelf.view(feature), shelf.activity.excerpts("strongest", feature)
    contexts = []
    for shown in view["strongest"][:CONTEXTS]:
        at = (excerpts.context_N == shown["context"]) & (excerpts.position_N == shown["position"])
        (n, *_) = np.flatnonzero(at).tolist()
        values = np.maximum(excerpts.acts_NT[n], 0).tolist()  # a row that does not count has no activation
        tokens = zip(excerpts.token_NT[n].tolist(), values, strict=True)
        contexts.append([{"text": shelf.text(token), "value": value} for token, value in tokens])
    promoted = [each["text"] for each in view["promoted"]]
    return shelf.table.row(feature) | {"promoted": promoted, "excerpts": contexts}
