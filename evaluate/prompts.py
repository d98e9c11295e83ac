"""Tokens of prompts, as the model of a chat reads them, and what they must fulfil."""

from collections.abc import Sequence
from typing import Any

from evaluate.operations import Tags
from harvest.chat_template import has_chat_template, render, writes_bos
from harvest.files import UserError
from harvest.templates import THINK, THINK_END, Refused

Prompt = str | list[dict[str, Any]]  # a text, or a conversation: messages with role and content


def prompt_ids(
    tokenizer: Any, prompts: Sequence[Prompt], chat: bool | None = None, bos: str | None = None
) -> list[list[int]]:
    """Token ids of the prompts, as a user's turn where the tokenizer has a chat template and `chat` is not False;
    of conversations, with a turn of the model begun.

    They begin with a BOS exactly where the documents or contexts of the sample do (`bos`, as in `Contexts.bos`), and
    never with two. None: what the tokenizer or its chat template does by itself. Raises UserError for an empty prompt,
    and for `chat` True without a template.
    """
    for number, prompt in enumerate(prompts, 1):
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise UserError(f"prompt {number} of {len(prompts)} is empty; give it text or leave it out")
    templated = chat is not False and has_chat_template(tokenizer)
    if chat and not templated:
        raise UserError("--chat: this model's tokenizer has no chat template; use --no-chat")
    try:
        texts = [render(tokenizer, _turns(p), add_generation_prompt=True) if templated else p for p in prompts]
    except Refused as refused:
        raise UserError(
            f"the model's chat template cannot write a prompt as a user's turn ({refused}); mend it, or use "
            "`steer --no-chat` and evaluate.steering=null"
        ) from None
    ids = [tokenizer(text, add_special_tokens=not templated and bos is None)["input_ids"] for text in texts]
    first = tokenizer.bos_token_id
    if bos is None or first is None:
        return ids
    if bos != "none":
        return [row if row[:1] == [first] else [first, *row] for row in ids]
    own = templated and writes_bos(tokenizer)
    return [row[1:] if own and row[:1] == [first] else row for row in ids]


def _turns(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def thinking_tags(tokenizer: Any, ids: Sequence[Sequence[int]], chat: bool | None = None) -> Tags:
    """The tokens around what the model thinks; `ids` are those of the prompts, `chat` that of `prompt_ids`.

    Raises UserError where it cannot be known when the model thinks.
    """
    vocabulary = tokenizer.get_vocab()
    if not {THINK, THINK_END} <= vocabulary.keys():
        raise UserError(
            f"where: thinking: this model's tokenizer has no tokens {THINK} and {THINK_END}; choose all, prompt or "
            "generated"
        )
    tags = Tags(vocabulary[THINK], vocabulary[THINK_END])
    templated = chat is not False and has_chat_template(tokenizer)
    if templated and THINK_END not in tokenizer.get_chat_template() and not any(tags.start in row for row in ids):
        raise UserError(
            f"where: thinking: the model's chat template does not know {THINK_END}, so nothing says when it thinks; "
            f"choose all, prompt or generated, or `steer --no-chat` with {THINK} in the prompts"
        )
    return tags


def position_limit(config: Any) -> int | None:
    """How many positions a model of this configuration of transformers has; None where it does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet's -1 means none


def check_lengths(ids: Sequence[Sequence[int]], new: int, limit: int | None) -> None:
    """Raise UserError for a prompt that has, with `new` tokens, more than the model's `limit` of positions."""
    for number, tokens in enumerate(ids):
        if limit and limit < len(tokens) + new:
            raise UserError(
                f"prompt {number + 1} of {len(ids)} has {len(tokens):,} tokens; with {new:,} new ones that is "
                f"more than the model's {limit:,} positions; shorten it or lower the number of new tokens"
            )
