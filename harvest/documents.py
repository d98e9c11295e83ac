"""Conversations and texts -> token ids, as the settings of a sample say: template, BOS, and what is said of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from harvest.chat_template import ChatTemplate, has_chat_template, template_markers, writes_bos
from harvest.config import SampleConfig
from harvest.conversations import Turn
from harvest.files import UserError
from harvest.templates import BOS, MARKERS, THINK, THINK_END, TOOL_MARKERS, Refused, Segment
from harvest.tokenizer import SegmentTokenizer

SHOWN = 6  # names of added tokens in a line


class DocumentTokenizer(SegmentTokenizer):
    """Documents of one sample, as text with markers and as token ids.

    `bos` is where a BOS is: at the start of each "document", of each "context" (then no document carries one), or
    nowhere ("none"); `bos_id` is its id. `template` is the one that conversations take, None for text alone.
    Raises UserError for a template or a BOS that the tokenizer does not have.
    """

    def __init__(self, loaded: Any, config: SampleConfig, rows: int | None = None) -> None:
        chats = [source.name for source in config.sources if source.rows not in ("text", "tokens")]
        self.template = (config.template or "model") if chats else None
        if self.template == "model" and not has_chat_template(loaded):
            raise UserError(
                f"sample.template: {'' if config.template is None else repr('model') + ': '}the model's tokenizer has "
                f"no chat template, and source {chats[0]!r} holds conversations; set chatml, deepseek-r1 or "
                "deepseek-r1-paper, the one that the model was trained with"
            )
        self.chat = ChatTemplate(loaded, self.template) if self.template else None
        super().__init__(loaded.backend_tokenizer, str(loaded.eos_token or ""), template_markers(loaded), rows)
        for marker in MARKERS.get(self.template or "", ()):
            self._require(marker)
        self.check()
        is_r1 = self.template == "deepseek-r1"
        self.bos_id: int | None = self.whole.token_to_id(BOS) if is_r1 else loaded.bos_token_id
        self._own_bos = is_r1 or (self.template == "model" and writes_bos(loaded))
        self.bos: str = config.bos
        if config.bos in ("document", "context") and self.bos_id is None:
            raise UserError(f"sample.bos: {config.bos!r}: the model's tokenizer has no BOS token; set none")
        if config.bos == "auto":
            has_bos = self.bos_id is not None and self.template != "deepseek-r1-paper"
            self.bos = "document" if has_bos and (self._own_bos or _adds_bos(loaded)) else "none"

    def compose(self, document: Sequence[Turn]) -> list[Segment]:
        """The text of a document as marker and content segments.

        Raises Refused for a conversation that the template cannot write, UserError for reasoning when the tokenizer
        lacks the template's tags.
        """
        if document[0].role == "" or self.chat is None:
            return [Segment(document[0].content, False), *([Segment(self.eos, True)] if self.eos else [])]
        if self.chat.name.startswith("deepseek"):
            if any(turn.reasoning is not None for turn in document):
                self._require(THINK)
                self._require(THINK_END)
            if any(turn.role == "tool" for turn in document) and not self.protected.issuperset(TOOL_MARKERS):
                raise Refused("a tool's turn, and the tokenizer has no markers for it")
        return self.chat.compose(document)

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[np.ndarray]:
        """Token ids, uint32 (tokens,), of each document, with or without a BOS as `bos` says.

        Raises UserError for an id that the model's embedding does not have.
        """
        found = super().encode(documents)
        starts = [len(ids) > 0 and int(ids[0]) == self.bos_id for ids in found]
        if self.bos == "document":
            bos = np.array([self.bos_id], np.uint32)
            return [ids if has else np.concatenate([bos, ids]) for ids, has in zip(found, starts, strict=True)]
        return [ids[1:] if has and self._own_bos else ids for ids, has in zip(found, starts, strict=True)]

    def notes(self) -> list[str]:
        """What a user should know of how text is read, a line each."""
        out = self.chat.notes() if self.chat else []
        if self.bos != "none":
            out.append(f"a BOS ({self.whole.id_to_token(self.bos_id or 0)}) begins each {self.bos}")
        added = self.whole.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        others = [token.content for token in added if token.content in self.protected and not token.special]
        if self.protected:
            kinds = [f"{len(special)} special tokens ({_some(special)})"] if special else []
            kinds += [f"markers {_some(others)}"] if others else []
            out.append(f"text that spells one of the tokenizer's {' or '.join(kinds)} stays text")
        return out

    def counted(self) -> list[str]:
        """What the model's template did to conversations so far, a line each."""
        counts = self.chat.counted.items() if self.chat else ()
        return [f"{count:,} times {what}" for what, count in sorted(counts)]

    def _require(self, marker: str) -> None:
        if marker not in self.protected:
            raise UserError(
                f"sample.template: writes the marker {marker!r}, which is no token of this model's tokenizer; choose "
                "the template that the model was trained with"
            )


def _adds_bos(loaded: Any) -> bool:
    """Whether a tokenizer, as transformers has it, puts a BOS in front of a text."""
    return loaded.bos_token_id is not None and loaded("a")["input_ids"][:1] == [loaded.bos_token_id]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
