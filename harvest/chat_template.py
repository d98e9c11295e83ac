"""Chat templates: conversations as transformers renders them, with markers and content told apart.

A conversation is rendered twice: as it is, and with placeholders in place of what it says. The second shows the
markers, by which the first is split. What a template does with reasoning, and what it adds by itself, is found by
rendering probes. Dates are fixed, so that the same settings give the same text.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from harvest.conversations import REASONING_FIELDS, Turn
from harvest.files import UserError
from harvest.templates import THINK, THINK_END, WRITTEN, Refused, Segment, reasoning_segments, spelling_of, with_gap

TODAY = datetime(2025, 1, 1)
SLOT = re.compile("\U0010fa00([0-9]+)\U0010fa01")  # a placeholder
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "at"}}},
    },
}
PROBE_CALL = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
STRUCTURES_KEPT = 10_000
SWITCH = re.compile(r"/\w+")  # a word for the template, which it takes out of the text
# What comes before reasoning, and what stands for empty reasoning before the content.
_TAGS = {1: re.compile(r"[<\[](\w+)[>\]]\s*$"), 0: re.compile(r"[<\[](\w+)[>\]]\s*[<\[]/\1[>\]]\s*$")}


def has_chat_template(loaded: Any) -> bool:
    """Whether a tokenizer, as transformers has it, comes with a chat template that can be used without tools."""
    try:
        return bool(loaded.get_chat_template())
    except ValueError:
        return False


def render(loaded: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text that a tokenizer's chat template makes of messages, on a fixed day.

    Raises Refused, with the template's own reason, for messages that it does not take.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled: Any = _compile_jinja_template(loaded.get_chat_template(options.get("chat_template")))
        compiled.globals["strftime_now"] = TODAY.strftime
        return loaded.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program: it may raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"the chat template refuses it: {first[:120]}") from None


def writes_bos(loaded: Any) -> bool:
    """Whether the chat template puts a BOS in front, as no part of a turn."""
    bos = loaded.bos_token
    if not bos or not has_chat_template(loaded):
        return False
    try:
        text = render(loaded, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2)
    except Refused:
        return False
    return text.startswith(bos) and text.count(bos) == 1


def template_markers(loaded: Any) -> set[str]:
    """Added tokens that the chat template writes; those of only letters or white space are ordinary text."""
    if not has_chat_template(loaded):
        return set()
    names = {token.content for token in loaded.added_tokens_decoder.values()}
    candidates = {name for name in names if len(name) > 2 and re.search(r"[^\w\s]", name)}
    texts = list(_probes(loaded))
    if texts:  # otherwise it is no template at all
        texts.append(_literals(str(loaded.get_chat_template())))
    return {name for name in candidates if any(name in text for text in texts)}


def _literals(template: str) -> str:
    """The text of a chat template and its string constants, apart from each other."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    parsed = _compile_jinja_template(template).environment.parse(template)
    constants = {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join({node.data for node in parsed.find_all(nodes.TemplateData)} | constants)


def _probes(loaded: Any) -> Iterator[str]:
    """Renderings of all that a conversation may hold, without the words of the probes."""
    says = {"role": "user", "content": _placeholder(0)}
    call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
    result = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": _placeholder(1)}
    thinks = {"role": "assistant", "content": _placeholder(1), "reasoning_content": _placeholder(2)}
    system = {"role": "system", "content": _placeholder(3)}
    used = [says, call, result]
    for messages in ([system, says, thinks, says, thinks], [says, thinks], used, [*used, thinks]):
        for options in ({}, {"add_generation_prompt": True}, {"tools": [PROBE_TOOL]}):
            try:
                yield SLOT.sub("\0", render(loaded, messages, **options))
            except Refused:
                continue


class _Piece(NamedTuple):
    """A marker, or what fills a placeholder."""

    text: str
    slot: int | None  # None for a marker


def _slot(turn: int, part: int) -> int:
    """Number of a placeholder; a turn's parts are its content (0), its reasoning (1) and what comes before it (2)."""
    return 3 * turn + part


def _placeholder(slot: int) -> str:
    return f"\U0010fa00{slot}\U0010fa01"


class ChatTemplate:
    """The chat template of a tokenizer, as transformers has it ("model"), or one of those that are written here.

    `reasoning` is where it takes an assistant's reasoning: a field of the message, "inline" in the content,
    "inserted" between tags in front of the answer where the template would drop it, or "plain" text.
    Raises UserError for a template that cannot write a user's turn and an answer.
    """

    def __init__(self, loaded: Any, name: str = "model") -> None:
        self.loaded, self.name = loaded, name
        self.source = WRITTEN.get(name) or str(loaded.get_chat_template())
        self.counted: Counter[str] = Counter()
        self._added = {token.content for token in loaded.added_tokens_decoder.values()}
        special = {token.content for token in loaded.added_tokens_decoder.values() if token.special}
        self._protected = spelling_of(special | template_markers(loaded))
        self._structures: dict[tuple[Any, ...], list[_Piece]] = {}
        try:
            self._base = self._probe("user", "assistant", "user")
            if [piece.slot for piece in self._base if piece.slot is not None] != [_slot(n, 0) for n in range(3)]:
                raise Refused("it leaves out what a user or an assistant says, or does not take it as text")
        except Refused as refused:
            raise UserError(
                f"sample.template: the model's own chat template cannot write a plain conversation ({refused}); choose "
                "chatml, deepseek-r1 or deepseek-r1-paper"
            ) from None
        try:
            self.joins_system = all(piece.slot != 0 for piece in self._probe("system", "user", "assistant"))
        except Refused:
            self.joins_system = True
        self.reasoning = {"model": self._reasoning_form(), "chatml": "plain"}.get(name, REASONING_FIELDS[0])

    def compose(self, document: Sequence[Turn]) -> list[Segment]:
        """The text of a conversation as transformers renders it, as marker and content segments.

        Raises Refused for a conversation that the template does not take, or would leave out a part of.
        """
        turns = self._system_joined(document)
        if self.name == "chatml":  # which takes the reasoning as a part of the content
            turns = [_trimmed(turn) if turn.reasoning else turn for turn in turns]
        shape = self._shape(turns)
        pieces = [p if p.slot is None else p._replace(text=_said(turns, p.slot)) for p in shape]
        if self.name == "model":
            try:
                text = self._render([self._message(i, turn, placeholders=False) for i, turn in enumerate(turns)])
            except Refused:  # of what is said, as the placeholders were taken
                text = ""
            found = self._split(text, shape, turns)
            if found is None and self._is_whole(text, turns):
                self.counted["the chat template followed a switch within the text"] += 1
                return [Segment(text, True)]
            if found is None:
                self.counted["the chat template would have cut or refused what was said; it was kept whole"] += 1
            pieces = found or pieces
        return [Segment(p.text, p.slot is None) for p in self._completed(pieces, turns) if p.text]

    def notes(self) -> list[str]:
        """What a user should know of the template, a line each."""
        if self.name != "model":
            return []
        out = []
        if added := self._added_text():
            out.append(f"the model's chat template begins a conversation without a system turn with {added!r}")
        if "strftime_now" in self.source:
            out.append(f"the chat template asks for the date; it is always {TODAY:%d %B %Y}")
        if self.joins_system:
            out.append("the chat template has no system turn; its text goes in front of the first user turn")
        if self.reasoning == "inserted":
            out.append(
                "the chat template drops an assistant's reasoning; it is written in front of the answer, between "
                f"{THINK} and {THINK_END}"
            )
        elif self.reasoning == "plain":
            out.append(
                "the chat template has no place for reasoning; it is written in front of the answer, as plain text"
            )
        return out

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return render(self.loaded, messages, chat_template=self.source)

    def _message(self, i: int, turn: Turn, *, placeholders: bool) -> dict[str, Any]:
        content, reasoning, before = (
            _placeholder(_slot(i, part)) if placeholders and text else text for part, text in enumerate(_parts(turn))
        )
        message: dict[str, Any] = {"role": turn.role}
        if turn.reasoning is None:
            return message | {"content": before + content}
        if self.reasoning == "inline":
            content = f"{before}{THINK}\n{reasoning}\n{THINK_END}\n\n{content}"
        elif self.reasoning == "plain":
            content = before + "\n\n".join(part for part in (reasoning, content) if part)
        elif self.reasoning == "inserted":
            content = content or _placeholder(_slot(i, 0))  # where the reasoning goes; the answer itself is empty
        else:
            message[self.reasoning] = reasoning
        return message | {"content": content}

    def _shape(self, turns: Sequence[Turn]) -> list[_Piece]:
        """Markers and placeholders, in the order of the text."""
        key = tuple((t.role, t.reasoning and 1, bool(t.content), bool(t.before)) for t in turns)
        if key not in self._structures:
            if len(self._structures) >= STRUCTURES_KEPT:
                self._structures.clear()
            messages = [self._message(i, turn, placeholders=True) for i, turn in enumerate(turns)]
            self._structures[key] = _pieces(self._render(messages))
        shape = self._structures[key]
        found = {piece.slot for piece in shape}
        for i, turn in enumerate(turns):
            if turn.content and _slot(i, 0) not in found:
                raise Refused(f"the chat template leaves out what the {turn.role} says")
            if turn.reasoning and self.reasoning != "inserted" and _slot(i, 1) not in found:
                self.counted[
                    "the chat template left out the reasoning of an earlier turn, which the model never reads"
                ] += 1
        return shape

    def _split(self, text: str, shape: list[_Piece], turns: Sequence[Turn]) -> list[_Piece] | None:
        """The rendered text in the pieces of a shape; None where they are not found in it."""
        out, place = [], 0
        for n, piece in enumerate(shape):
            if piece.slot is None:
                found = piece.text if text.startswith(piece.text, place) else None
            else:
                after = shape[n + 1].text if n + 1 < len(shape) and shape[n + 1].slot is None else ""
                said = _said(turns, piece.slot) or _placeholder(piece.slot)
                found = next((f for f in _forms(said) if text.startswith(f + after, place)), None)
            if found is None:
                return None
            out.append(_Piece(found, piece.slot))
            place += len(found)
        return out if place == len(text) else None

    def _is_whole(self, text: str, turns: Sequence[Turn]) -> bool:
        """Whether a text that could not be split holds all that is said but for switches such as /no_think, and none of
        it spells a protected token."""
        said = [part for turn in turns for part in (turn.content, turn.reasoning or "", turn.before) if part]
        if self.reasoning == "inserted" or any(map(self._protected.search, said)):
            return False
        return all(_words(part) in _words(text) for part in said)

    def _completed(self, pieces: list[_Piece], turns: Sequence[Turn]) -> list[_Piece]:
        """The pieces with what the template has no place for: text before the reasoning, and inserted reasoning."""
        placed = {piece.slot for piece in pieces}
        out: list[_Piece] = []
        for piece in pieces:
            number, part = divmod(piece.slot or 0, 3)
            turn, slot = turns[number], _slot(number, 2)
            if piece.slot is None or part == 2 or turn.reasoning is None:
                out.append(piece)
                continue
            before = _Piece(with_gap(turn.before) if slot not in placed else "", slot)
            if part == 0 and self.reasoning == "inserted":
                out += [_Piece(s.text, None if s.is_marker else piece.slot) for s in reasoning_segments(turn)]
                piece = piece if turn.content else piece._replace(text="")
            elif (part == 1 or not turn.reasoning) and (tag := _TAGS[part].search(out[-1].text)):
                marker = out.pop().text
                out += [_Piece(marker[: tag.start()], None), before, _Piece(marker[tag.start() :], None)]
                placed.add(slot)
            elif part == 0 or not turn.content:
                out.append(before)
            out.append(piece)
        return out

    def _system_joined(self, document: Sequence[Turn]) -> Sequence[Turn]:
        system = [turn.content for turn in document if turn.role == "system"]
        first = next((i for i, turn in enumerate(document) if turn.role == "user"), None)
        if not self.joins_system or not system or first is None:
            return document
        user = document[first]
        joined = user._replace(content="\n\n".join([*system, user.content]))
        return [joined if i == first else turn for i, turn in enumerate(document) if turn.role != "system"]

    def _probe(self, *roles: str) -> list[_Piece]:
        messages = [{"role": role, "content": _placeholder(_slot(i, 0))} for i, role in enumerate(roles)]
        return _pieces(self._render(messages))

    def _reasoning_form(self) -> str:
        content, reasoning = _placeholder(1), _placeholder(2)
        for field in REASONING_FIELDS:
            if self._survives({"content": content, field: reasoning}):
                return field
        if THINK not in self._added and THINK not in self.source:
            return "plain"
        inline = f"{THINK}\n{reasoning}\n{THINK_END}\n\n{content}"
        return "inline" if self._survives({"content": inline}) else "inserted"

    def _survives(self, answer: dict[str, Any]) -> bool:
        """Whether the reasoning (2) of an answer is once in the text, and before its content (1)."""
        messages = [{"role": "user", "content": _placeholder(0)}, {"role": "assistant", **answer}]
        try:
            slots = [piece.slot for piece in _pieces(self._render(messages)) if piece.slot is not None]
        except Refused:
            return False
        return slots.count(1) == slots.count(2) == 1 and slots.index(2) < slots.index(1)

    def _added_text(self) -> str:
        """What comes before a first user turn and not before a second one, but for a BOS."""
        slots = [piece.slot for piece in self._base]
        spelling = re.compile(f"({spelling_of(self._added).pattern})")  # parts: added tokens and what is between them
        first, second = (
            [part for part in spelling.split("".join(p.text for p in self._base[start:stop])) if part]
            for start, stop in ((0, slots.index(_slot(0, 0))), (slots.index(_slot(1, 0)), slots.index(_slot(2, 0))))
        )
        while first and second and first[-1] == second[-1]:
            first, second = first[:-1], second[:-1]
        return "".join(first).removeprefix(self.loaded.bos_token if writes_bos(self.loaded) else "").strip()


def _pieces(text: str) -> list[_Piece]:
    parts = SLOT.split(text)
    pieces = [_Piece(part, None) if n % 2 == 0 else _Piece("", int(part)) for n, part in enumerate(parts)]
    return [piece for piece in pieces if piece.text or piece.slot is not None]


def _parts(turn: Turn) -> tuple[str, str, str]:
    return turn.content, turn.reasoning or "", with_gap(turn.before)


def _said(turns: Sequence[Turn], slot: int) -> str:
    return _parts(turns[slot // 3])[slot % 3]


def _trimmed(turn: Turn) -> Turn:
    content = turn.content.rstrip()
    return turn._replace(content=content, reasoning=turn.reasoning if content else (turn.reasoning or "").rstrip())


def _words(text: str) -> str:
    return " ".join(SWITCH.sub(" ", text).split())


def _forms(text: str) -> Iterator[str]:
    """A text as a template may write it: as it is, trimmed, without line feeds around it, or within JSON."""
    yield text
    yield from (text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.rstrip("\n"), text.lstrip("\n"))
    yield json.dumps(text, ensure_ascii=False)[1:-1]
