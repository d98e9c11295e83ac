"""A model's tokenizer, for documents in which markers make special tokens and content never does.

A document is read as one string, so that its tokens are those that the model would have read. Content that spells a
protected token (a special one, or a marker of a template) shows in the ids, which then hold more of them than the
markers make. Such a document is read again with a tokenizer in which these tokens have other names.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.hub import where_it_is
from harvest.templates import ALL_MARKERS, Segment, spelling_of

# GPT-2's alphabet: these bytes stand for themselves, the others are the characters from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))
}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
BATCH_CHARACTERS = 1_500_000  # read at once: 200 MB within `tokenizers`
OTHERS_KEPT = 8  # tokenizers of other names, 20 MB each
MARKERS_KEPT = 10_000  # texts between two contents whose protected tokens are remembered
# A text is read in parts of PART characters from LONG_TEXT on; parts are joined where AGREEING tokens on each side do.
LONG_TEXT, PART, OVERLAP, AGREEING = 500_000, 400_000, 8_000, 32
# Other names are of characters of private use.
_OPEN, _CLOSE = "\U0010f3a7", "\U0010f51c"
_DIGITS = {ord("0") + n: chr(0x10F800 + n) for n in range(10)}


class SegmentTokenizer:
    """Token ids of documents.

    `protected` are the tokens that content never makes: special ones, and those added tokens that a written
    template or one of `markers` names. Other added tokens, such as runs of blanks, are ordinary text.
    `rows` of the model's embedding are the ids that it can read (None: not known); `known_ids` are those that the
    tokenizer has as well.
    """

    def __init__(self, whole: Tokenizer, eos: str = "", markers: Collection[str] = (), rows: int | None = None) -> None:
        whole.no_truncation()
        whole.no_padding()
        self.whole, self.eos, self.rows = whole, eos, rows
        vocabulary = max(whole.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.known_ids = min(vocabulary, rows or vocabulary)
        added = whole.get_added_tokens_decoder()
        self.protected = {t.content for t in added.values() if t.special or t.content in {*ALL_MARKERS, *markers}}
        self._spelling = spelling_of(self.protected)
        self._unspelled = _unspelled_tokens(whole) & self.protected
        self._counted = np.zeros(max(vocabulary, 1), bool)
        self._counted[[i for i, t in added.items() if t.content in self.protected - self._unspelled]] = True
        # Where one can begin within another, equal counts do not say which of two was made.
        starts = {name[:n] for name in self.protected for n in range(1, len(name))}
        self._ambiguous = any(name[n:] in starts for name in self.protected for n in range(1, len(name)))
        self._others: dict[tuple[int, bool], RenamedTokens] = {}

        @lru_cache(MARKERS_KEPT)
        def spelt(marker: str) -> int:
            return sum(match[0] not in self._unspelled for match in self._spelling.finditer(marker))

        self._spelt = spelt

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[np.ndarray]:
        """Token ids, uint32 (tokens,), of each document; no token is added that no segment asks for.

        Raises UserError for an id that the model's embedding does not have.
        """
        merged = [_merged(document) for document in documents]
        found = self._encoded(self.whole, ["".join(s.text for s in document) for document in merged])
        out = []
        for document, ids in zip(merged, found, strict=True):
            kept = ids if self._is_as_written(document, ids) else self._encode_apart(document)
            if self.rows is not None and len(kept) and (largest := int(kept.max())) >= self.rows:
                raise UserError(
                    f"model.name: its tokenizer makes token {largest} ({self.whole.id_to_token(largest)!r}), but the "
                    f"model's embedding has {self.rows:,} rows; take the tokenizer that belongs to the model"
                )
            out.append(kept)
        return out

    def encode_text(self, text: str) -> list[int]:
        """Token ids of content that stands alone."""
        return self.encode([[Segment(text, False)]])[0].tolist()

    def check(self) -> None:
        """Compare the tokenizer with the one of other names: every id, and a text with each of the markers.

        Raises UserError when they differ.
        """
        renamed = self._renamed(0)
        for name, other in renamed.names.items():
            whole = self.whole.encode(f"b {name} a\n\n  b", add_special_tokens=False).ids
            apart = renamed.tokenizer.encode(f"b {other} a\n\n  b", add_special_tokens=False).ids
            if self.whole.token_to_id(name) in whole and whole != renamed.ids[apart].tolist():
                raise UserError(
                    f"model.name: its tokenizer reads the text around {name!r} otherwise when its special tokens have "
                    "other names, so text that spells one of them could not be kept apart"
                )

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

    def _encoded(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for batch in _batches(texts):
            short = [text for text in batch if len(text) < LONG_TEXT]
            encodings = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
            for text in batch:
                is_short = len(text) < LONG_TEXT
                yield np.array(next(encodings).ids, np.uint32) if is_short else encode_long(tokenizer, text)

    def _is_as_written(self, document: Sequence[Segment], ids: np.ndarray) -> bool:
        """Whether the markers alone made the protected tokens of a document."""
        if all(s.is_marker for s in document):
            return True
        if any(name in s.text for name in self._unspelled for s in document if not s.is_marker):
            return False
        made = int(self._counted[ids].sum())
        written = sum(self._spelt(s.text) for s in document if s.is_marker)
        return made == written and not (self._ambiguous and made)

    def _encode_apart(self, document: Sequence[Segment]) -> np.ndarray:
        variant = 0
        while any(opening(variant) in s.text for s in document if not s.is_marker):
            variant += 1
        for anywhere in (False, True):
            renamed = self._renamed(variant, anywhere=anywhere)
            text = "".join(renamed.written(self._spelling, s.text) if s.is_marker else s.text for s in document)
            ids = renamed.ids[next(self._encoded(renamed.tokenizer, [text]))]
            if self._counted[ids].sum() == sum(self._spelt(s.text) for s in document if s.is_marker):
                break
        return ids

    def _renamed(self, variant: int, *, anywhere: bool = False) -> "RenamedTokens":
        if (variant, anywhere) not in self._others:
            if len(self._others) == OTHERS_KEPT:  # texts may name ever new ones
                self._others.pop(next(iter(self._others)))
            self._others[variant, anywhere] = rename_tokens(self.whole, self.protected, variant, anywhere=anywhere)
        return self._others[variant, anywhere]


class RenamedTokens(NamedTuple):
    """A tokenizer whose protected tokens have other names, so that text which spells them stays text."""

    tokenizer: Tokenizer
    names: dict[str, str]  # protected token -> its other name
    ids: np.ndarray  # uint32: its ids -> those of the whole tokenizer

    def written(self, spelling: re.Pattern[str], marker: str) -> str:
        """A marker with the other names in place of what `spelling` finds."""
        return spelling.sub(lambda match: self.names[match[0]], marker)


def opening(variant: int) -> str:
    """What all other names of a variant begin with, and what the text must not hold."""
    return _OPEN + str(variant).translate(_DIGITS) + _CLOSE


def rename_tokens(
    whole: Tokenizer, protected: Collection[str], variant: int = 0, *, anywhere: bool = False
) -> RenamedTokens:
    """The tokenizer with all protected tokens renamed, in its vocabulary as well as among the added tokens.

    `anywhere` makes them tokens also where their flags would not, as beside a letter. Ids are mapped back by name, as
    `tokenizers` numbers added tokens anew. Raises UserError when a token is lost on the way.
    """
    names = {name: opening(variant) + str(n).translate(_DIGITS) + _CLOSE for n, name in enumerate(sorted(protected))}
    spec: dict[str, Any] = json.loads(whole.to_str())
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    for token in spec["added_tokens"]:
        if token["content"] in names:
            other = token["content"] = names[token["content"]]
            survives = whole.normalizer is None or other in whole.normalizer.normalize_str(f"a{other}a")
            token["normalized"] &= not anywhere and survives
            token["single_word"] &= not anywhere
    # A Unigram model finds the pieces of its vocabulary in any text; BPE and WordPiece may make them. The names of
    # bytes stay, as the model looks for them.
    model, inner = spec["model"], {name: other for name, other in names.items() if not _BYTE.fullmatch(name)}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {inner.get(name, name): token_id for name, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[inner.get(name, name), score] for name, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = inner.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if inner.keys().isdisjoint((*pair, "".join(pair)))]
    renamed = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    before, after = whole.get_vocab(with_added_tokens=True), renamed.get_vocab(with_added_tokens=True)
    ids = np.zeros(max(after.values(), default=0) + 1, np.uint32)
    for name, token_id in before.items():
        new = [after[n] for n in (name, names.get(name)) if n in after]
        if not new:
            raise UserError(f"model.name: its tokenizer loses the token {name!r} when its special tokens are renamed")
        ids[new] = token_id
    return RenamedTokens(renamed, names, ids)


def encode_long(tokenizer: Tokenizer, text: str, size: int = PART, overlap: int = OVERLAP) -> np.ndarray:
    """Token ids, uint32 (tokens,), of a text: those of the text as one string, without special tokens around it.

    `tokenizers` takes about 150 bytes of memory for each of text, 7.5 GB for 50 MB, so it is read in parts. Where two
    parts overlap, each is wrong near its cut end and right away from it: they are joined in the middle of a stretch of
    tokens in which both agree, ids and places. Where they do not, the two become one. So the parts change no token.
    """
    done: list[np.ndarray] = []
    first, end, taken = 0, size, 0  # `taken` tokens of the part are in `done` already
    part = _part(tokenizer, text, first, end)
    while end < len(text):
        # A part that starts where a token does falls into step at once, also within one letter a million times.
        start = int(part[min(np.searchsorted(part[:, 1], end - overlap), len(part) - 1), 1])
        following = _part(tokenizer, text, start, end + size)
        here, there = (int(np.searchsorted(p[:, 1], (start + end) // 2)) for p in (part, following))
        near, same = part[here - AGREEING : here + AGREEING], following[there - AGREEING : there + AGREEING]
        if here >= taken + AGREEING and there >= AGREEING and len(near) == 2 * AGREEING and np.array_equal(near, same):
            done.append(part[taken:here, 0].astype(np.uint32))  # a view would keep the places too
            first, part, taken = start, following, there
        else:
            part = _part(tokenizer, text, first, end + size)
        end += size
    return np.concatenate([*done, part[taken:, 0].astype(np.uint32)])


def _part(tokenizer: Tokenizer, text: str, first: int, end: int) -> np.ndarray:
    """Id, start and end in the whole text of each token of a part, int64 (tokens, 3)."""
    encoding = tokenizer.encode(text[first:end], add_special_tokens=False)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + first
    return np.column_stack([np.array(encoding.ids, np.int64), places])


def _unspelled_tokens(whole: Tokenizer) -> set[str]:
    """What the model itself makes of characters that its vocabulary lacks, without their being spelt."""
    unknown = getattr(whole.model, "unk_token", None)
    if isinstance(whole.model, models.Unigram):
        number = json.loads(whole.to_str())["model"].get("unk_id")
        unknown = None if number is None else whole.id_to_token(number)
    return {f"<0x{byte:02X}>" for byte in range(256)} | ({unknown} if unknown else set())


def _merged(document: Sequence[Segment]) -> list[Segment]:
    """The same with neighbours of one kind as one segment: a token may lie across two markers."""
    out: list[Segment] = []
    for segment in document:
        if out and out[-1].is_marker == segment.is_marker:
            out[-1] = Segment(out[-1].text + segment.text, segment.is_marker)
        elif segment.text:
            out.append(segment)
    return out


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts that together take a bounded amount of memory, in their order."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch


def load_tokenizer(model: ModelConfig, commit: str | None, offline: bool) -> SegmentTokenizer:
    """The tokenizer of a local folder or a hub model, for text without a template.

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
        loaded = AutoTokenizer.from_pretrained(model.name, **where_it_is(model, commit, offline))
    except Exception as error:  # tokenizers raises a bare Exception for a damaged tokenizer.json
        if isinstance(error, OSError) and error.errno:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {model.name!r}: no tokenizer can be loaded from it: {first}") from None
    if not isinstance(getattr(loaded, "backend_tokenizer", None), Tokenizer):
        raise UserError(f"model.name: {model.name!r}: its tokenizer has no tokenizer.json, which is needed")
    return loaded


def embedding_rows(model: ModelConfig, commit: str | None, offline: bool) -> int | None:
    """Rows of the model's embedding, by its config.json; None where that does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.name, **where_it_is(model, commit, offline))
    except (OSError, ValueError, KeyError):
        return None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None
