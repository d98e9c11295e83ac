"""Messages as a tokenizer's chat template writes them, on a fixed day, and what can be seen from that alone."""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from harvest.templates import Refused

TODAY = datetime(2025, 1, 1)
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "at"}}},
    },
}
PROBE_CALL = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
SLOT = re.compile("\U0010fa00([0-9]+)\U0010fa01")


def placeholder(slot: int) -> str:
    """What stands for a text when a template is looked at; `SLOT` finds it."""
    return f"\U0010fa00{slot}\U0010fa01"


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
        compiled: Any = _compile_jinja_template(loaded.get_chat_template())
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
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        text = render(loaded, [user, answer, user, answer])
    except Refused:
        return False
    return text.startswith(bos) and text.count(bos) == 1


def template_markers(loaded: Any) -> set[str]:
    """Added tokens that the chat template writes; those of only letters or white space are ordinary text."""
    from transformers.utils.chat_template_utils import _get_template_literal_text

    if not has_chat_template(loaded):
        return set()
    names = {token.content for token in loaded.added_tokens_decoder.values()}
    candidates = {name for name in names if len(name) > 2 and re.search(r"[^\w\s]", name)}
    texts = list(_probes(loaded))
    if texts:  # otherwise it is no template at all
        texts.append(_get_template_literal_text(str(loaded.get_chat_template())))
    return {name for name in candidates if any(name in text for text in texts)}


def _probes(loaded: Any) -> Iterator[str]:
    """Renderings of all that a conversation may hold, without the words of the probes."""
    says = {"role": "user", "content": placeholder(0)}
    call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
    result = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": placeholder(1)}
    thinks = {"role": "assistant", "content": placeholder(1), "reasoning_content": placeholder(2)}
    for messages in (
        [{"role": "system", "content": placeholder(3)}, says, thinks, says, thinks],
        [says, thinks],
        [says, call, result],
        [says, call, result, thinks],
    ):
        for options in ({}, {"add_generation_prompt": True}, {"tools": [PROBE_TOOL]}):
            try:
                yield SLOT.sub("\0", render(loaded, messages, **options))
            except Refused:
                continue
