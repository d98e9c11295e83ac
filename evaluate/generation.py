"""Text that a model writes while features of its activations are operated on.

Prompts are padded on the left and read in one batch, each with every list of operations, with a KV cache. What the
operations saw is counted, and compared with what they must have seen: they hold for every token that is read. A
sample is the argmax of logits / temperature + Gumbel noise, which is a draw from the softmax; the noise
depends on the seed, the prompt and the step alone. So completions of one prompt under several lists
differ by the operations only, and no batch changes a sample.

Shape suffixes: B sequences, S tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from evaluate.operations import Interventions, Operator, Tags
from harvest.chat_template import has_chat_template, render, writes_bos
from harvest.files import UserError
from harvest.language_model import HookedModel
from harvest.progress import Progress
from harvest.templates import THINK, THINK_END, Refused


class Sampling(NamedTuple):
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    token_ids: list[int]  # without the token that ends it
    ended: bool  # before max_new_tokens
    processed: int  # positions that the model read: prompt and answer, without the last token that it wrote
    changed: int  # of these, where an operation was done


class _Noise(LogitsProcessor):
    """Gumbel noise of one stream a prompt, the same for each of its `repeats` sequences."""

    def __init__(self, seed: int, prompts: range, repeats: int) -> None:
        self.generators = [np.random.default_rng([seed, prompt]) for prompt in prompts]
        self.repeats = repeats

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([generator.gumbel(size=scores.shape[1]) for generator in self.generators])
        return scores + torch.from_numpy(noise).repeat_interleave(self.repeats, 0).to(scores)


def prompt_ids(
    tokenizer: Any, prompts: Sequence[str], chat: bool | None = None, bos: str | None = None
) -> list[list[int]]:
    """Token ids of the prompts, as a user's turn where the tokenizer has a chat template and `chat` is not False.

    They begin with a BOS exactly where the documents or contexts of the sample do (`bos`, as in `Contexts.bos`), and
    never with two. None: what the tokenizer or its chat template does by itself. Raises UserError for an empty prompt,
    and for `chat` True without a template.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} of {len(prompts)} is empty; give it text or leave it out")
    templated = chat is not False and has_chat_template(tokenizer)
    if chat and not templated:
        raise UserError("--chat: this model's tokenizer has no chat template; use --no-chat")
    try:
        texts = [
            render(tokenizer, [{"role": "user", "content": p}], add_generation_prompt=True) if templated else p
            for p in prompts
        ]
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


@torch.inference_mode()
def complete(
    model: HookedModel,
    tokenizer: Any,
    interventions: Interventions,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    chat: bool | None = None,
    bos: str | None = None,
    batch_sequences: int = 64,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Completions [prompt][list of operations]. `chat` and `bos` are those of `prompt_ids`.

    Raises UserError for prompts that are empty or too long for the model, for operations on thinking where that is not
    known, and where the model did not pass the hook at every position.
    """
    causal: Any = model.model
    ids = prompt_ids(tokenizer, prompts, chat, bos)
    limit = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    check_lengths(ids, sampling.max_new_tokens, limit)
    thinks = any(operation.where == "thinking" for operations in interventions.lists for operation in operations)
    tags = thinking_tags(tokenizer, ids, chat) if thinks else None
    ends = _end_tokens(causal, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    # The model's own defaults (temperature, penalties) would fill what is not set here.
    causal.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    hook, count = interventions.saved.hook, len(interventions.lists)
    at_once = max(1, batch_sequences // count)
    out: list[list[Completion]] = []
    for start in range(0, len(ids), at_once):
        part = [row for row in ids[start : start + at_once] for _ in range(count)]
        width = max(map(len, part))
        ids_BS = torch.tensor([[pad] * (width - len(row)) + row for row in part], device=model.device)
        mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part], device=model.device)
        operator = Operator(interventions, mask_BS.bool(), ends, tags)
        with model.changed(hook, operator):
            written_BS = causal.generate(
                ids_BS,
                attention_mask=mask_BS,
                logits_processor=_processors(sampling, range(start, start + len(part) // count), count),
            )
        rows = [
            _completion(tokenizer, row, ends, counts)
            for row, counts in zip(written_BS[:, width:].tolist(), operator.counts(), strict=True)
        ]
        for prompt, row in zip(part, rows, strict=True):
            _check_processed(row, len(prompt), hook)
        out += [rows[i : i + count] for i in range(0, len(rows), count)]
        if progress:
            progress.advance(len(rows))
    return out


def check_lengths(ids: Sequence[Sequence[int]], new: int, limit: int | None) -> None:
    """Raise UserError for a prompt that has, with `new` tokens, more than the model's `limit` of positions."""
    for number, tokens in enumerate(ids):
        if limit and len(tokens) + new > limit:
            raise UserError(
                f"prompt {number + 1} of {len(ids)} has {len(tokens):,} tokens; with {new:,} new ones that is "
                f"more than the model's {limit:,} positions; shorten it or lower the number of new tokens"
            )


def _end_tokens(causal: Any, tokenizer: Any) -> set[int]:
    own = causal.generation_config.eos_token_id
    ends = set(own if isinstance(own, list) else [own])
    return {token for token in ends | {tokenizer.eos_token_id} if token is not None}


def _processors(sampling: Sampling, prompts: range, repeats: int) -> LogitsProcessorList:
    if not sampling.temperature:
        return LogitsProcessorList()
    top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(
        [TemperatureLogitsWarper(sampling.temperature), *top_p, _Noise(sampling.seed, prompts, repeats)]
    )


def _completion(tokenizer: Any, ids: list[int], ends: set[int], counts: tuple[int, int]) -> Completion:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    return Completion(tokenizer.decode(kept, skip_special_tokens=False), kept, stop is not None, *counts)


def _check_processed(completion: Completion, prompt: int, hook: str) -> None:
    """Raise UserError unless the hook saw the prompt and every token written that a further one was read from."""
    expected = prompt + len(completion.token_ids) - (not completion.ended)
    if completion.processed != expected:
        raise UserError(
            f"{hook}: the model read {expected:,} tokens of a sequence, and {completion.processed:,} passed the hook: "
            "it runs this layer in another way while it generates, so nothing that is done there holds; take another "
            "hook"
        )
