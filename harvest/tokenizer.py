"""A model's tokenizer, used two ways: markers make special tokens, content never does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.templates import Segment

# GPT-2's alphabet: these bytes stand for themselves, the others are the characters from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))
}


class SegmentTokenizer:
    """Token ids of documents.

    `whole` knows all added tokens and reads the markers; `plain` has none but those that are white
    space (GPT-NeoX keeps runs of blanks so), and reads the content.
    """

    def __init__(self, whole: Tokenizer, eos: str) -> None:
        spec: dict[str, Any] = json.loads(whole.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].strip() and not t["special"]]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        self.plain = Tokenizer.from_str(json.dumps(spec))
        self.whole = whole
        self.eos = eos
        self._markers: dict[str, list[int]] = {}

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[np.ndarray]:
        """Token ids, uint32 (tokens,), of each document; no token is added that no segment asks for.

        Raises UserError when a marker holds no token of this tokenizer: the template is another model's.
        """
        contents = [s.text for document in documents for s in document if not s.is_marker]
        ids = iter(self.plain.encode_batch_fast(contents, add_special_tokens=False))
        return [
            np.fromiter(
                (i for s in document for i in (self._marker(s.text) if s.is_marker else next(ids).ids)),
                np.uint32,
            )
            for document in documents
        ]

    def text(self, token_id: int) -> str:
        """What a token adds to a text, its leading blank included; bytes that are no whole character as \\xe2\\x80.

        Empty for a number that the vocabulary does not have.
        """
        piece = self.whole.id_to_token(token_id)
        if piece is None:
            return ""
        # Decoders drop the blank of the first token, so another stands before it.
        anchor = self.whole.token_to_id("a")
        ids = [token_id] if anchor is None else [anchor, token_id]
        text = self.whole.decode(ids, skip_special_tokens=False)[len(ids) - 1 :]
        if "\ufffd" in text and all(character in _BYTES for character in piece):
            return "".join(f"\\x{_BYTES[c]:02x}" if _BYTES[c] > 126 else chr(_BYTES[c]) for c in piece)
        return piece if "\ufffd" in text else text

    def _marker(self, text: str) -> list[int]:
        if text not in self._markers:
            known = {token.content for token in self.whole.get_added_tokens_decoder().values()}
            if not any(name in text for name in known if name.strip()):
                raise UserError(
                    f"sample.template: writes the marker {text.strip()!r}, which holds no token of this model's "
                    "tokenizer; choose the template that the model was trained with"
                )
            self._markers[text] = self.whole.encode(text, add_special_tokens=False).ids
        return self._markers[text]


def load_tokenizer(model: ModelConfig, commit: str | None, offline: bool) -> SegmentTokenizer:
    """The tokenizer of a local folder or a hub model, for documents.

    Raises UserError when it cannot be had, or is not of the `tokenizers` kind.
    """
    loaded = load_whole_tokenizer(model, commit, offline)
    return SegmentTokenizer(loaded.backend_tokenizer, str(loaded.eos_token or ""))


def load_whole_tokenizer(model: ModelConfig, commit: str | None, offline: bool) -> Any:
    """The same as transformers has it, with chat template and padding.

    Raises UserError as `load_tokenizer` does.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            model.name,
            revision=commit,
            local_files_only=offline or Path(model.name).is_dir(),
            trust_remote_code=False,
        )
    except Exception as error:  # tokenizers raises a bare Exception for a damaged tokenizer.json
        if isinstance(error, OSError) and error.errno:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {model.name!r}: no tokenizer can be loaded from it: {first}") from None
    if not isinstance(getattr(loaded, "backend_tokenizer", None), Tokenizer):
        raise UserError(f"model.name: {model.name!r}: its tokenizer has no tokenizer.json, which is needed")
    return loaded
