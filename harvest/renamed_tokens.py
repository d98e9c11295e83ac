"""A tokenizer whose special tokens and markers have other names, so that text which spells them stays text.

The names are sentinels: characters of private use that the text does not hold. Ids are mapped back by name, since
`tokenizers` numbers added tokens anew when it reads a tokenizer.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from harvest.files import UserError

BYTE = re.compile("<0x[0-9A-F]{2}>")
_OPEN, _CLOSE = "\U0010f3a7", "\U0010f51c"
_DIGITS = {ord("0") + n: chr(0x10F800 + n) for n in range(10)}


class RenamedTokens(NamedTuple):
    """The other tokenizer."""

    tokenizer: Tokenizer
    names: dict[str, str]  # protected token -> sentinel
    ids: np.ndarray  # uint32: its ids -> those of the whole tokenizer

    def written(self, spelling: re.Pattern[str], marker: str) -> str:
        """A marker with the other names in place of what `spelling` finds."""
        return spelling.sub(lambda match: self.names[match[0]], marker)


def opening(variant: int) -> str:
    """What all sentinels of a variant begin with, and what the text must not hold."""
    return _OPEN + str(variant).translate(_DIGITS) + _CLOSE


def rename_tokens(
    whole: Tokenizer, protected: Collection[str], variant: int = 0, *, anywhere: bool = False
) -> RenamedTokens:
    """The tokenizer with all protected tokens renamed, in its vocabulary as well as among the added tokens.

    `anywhere` makes them tokens also where their flags would not, as beside a letter. Raises UserError when a
    token is lost on the way.
    """
    names = {name: opening(variant) + str(n).translate(_DIGITS) + _CLOSE for n, name in enumerate(sorted(protected))}
    spec: dict[str, Any] = json.loads(whole.to_str())
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    for token in spec["added_tokens"]:
        if token["content"] in names:
            sentinel = token["content"] = names[token["content"]]
            survives = whole.normalizer is None or sentinel in whole.normalizer.normalize_str(f"a{sentinel}a")
            token["normalized"] &= not anywhere and survives
            token["single_word"] &= not anywhere
    _rename_in_model(spec["model"], names)
    renamed = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    before, after = whole.get_vocab(with_added_tokens=True), renamed.get_vocab(with_added_tokens=True)
    ids = np.zeros(max(after.values(), default=0) + 1, np.uint32)
    for name, token_id in before.items():
        new = [after[n] for n in (name, names.get(name)) if n in after]
        if not new:
            raise UserError(f"model.name: its tokenizer loses the token {name!r} when its special tokens are renamed")
        ids[new] = token_id
    return RenamedTokens(renamed, names, ids)


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """A Unigram model finds the pieces of its vocabulary in any text; BPE and WordPiece may make them.

    Only the names of bytes stay, as the model looks for them.
    """
    names = {name: other for name, other in names.items() if not BYTE.fullmatch(name)}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(name, name): token_id for name, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
