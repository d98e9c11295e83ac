"""What the model writes while features are operated on, token by token; and how probable it finds a text.

The same bytes as `pipeline steer --together` with the same prompt, operations and sampling: that command writes two
answers at once, with and without them, and an answer depends on how many are written at once, but on nothing that is
written (evaluate/engine.py). So two is also the number here where one side is asked for. Largest activations are the
evaluation's here; those that the command finds by itself may differ in the last bit, so it is given these.

The activation of the shaded feature at a token is known when the model reads the token, to write the next one. So no
pass is added, and each token comes with its value one step later than it would come without. It is what the feature
reads, before any operation. The last token of an answer that was cut at its limit is never read and has none.

Shape suffixes: S tokens of a text, V vocabulary, K likeliest tokens.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.engine import Completion, Engine, Request
from evaluate.operations import Interventions, Operation, Operator, Reading, Tags, check_operations, effective
from evaluate.prompts import check_lengths, thinking_tags
from evaluate.sampler import Sampling
from harvest.files import UserError
from pipeline.explore.catalog import Shelf
from pipeline.explore.reading import Reader

SLOTS = 2  # at least: those of `steer` with one list of operations
PLACES_AT_ONCE = 64  # whose probabilities are in memory beside the logits
HALF = "�"  # what stands for bytes that are no whole character
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte, which a decoder joins with its neighbours
CLEANED = 4  # characters at the end that a tokenizer which cleans up blanks may still change


class Ask(NamedTuple):
    """What is to be written."""

    ids: list[int]  # of the prompt (`Reader.prompt_ids`)
    lists: Sequence[Sequence[Operation]]  # one a side; an empty one leaves the model as it is
    sampling: Sampling
    shade: int | None = None  # a feature
    sample: int = 0  # which of several answers to one prompt: each has noise of its own; `steer` has number 0
    chat: bool | None = None  # that of `Reader.prompt_ids`; operations on thinking ask for it


class Written(NamedTuple):
    """A token of a side."""

    side: int
    id: int | None  # None: text that was held back, and is not whole at the end either
    text: str  # those of a side make up its text; empty while a character is not whole
    value: float | None  # activation of the shaded feature at this token; None where there is none


class End(NamedTuple):
    """The end of a side."""

    side: int
    completion: Completion


Event = Written | End


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities. Place s is that of token s, place S that behind the last."""

    of_S: np.ndarray  # float32: of each token after those before it; NaN for the first
    top_id_SK: np.ndarray  # int64 (S + 1, K): the likeliest tokens at each place, best first; -1 at the first
    top_SK: np.ndarray  # float32 (S + 1, K): theirs; NaN at the first


def write(reader: Reader, shelf: Shelf, ask: Ask) -> Iterator[Event]:
    """Tokens of all sides as they are written, and the end of each.

    A model that keeps more than keys and values writes a whole answer in one step. Raises UserError for a prompt that
    is empty, too long, or of tokens that the model does not have, and for operations that cannot be done.
    """
    _check(reader, ask.ids, ask.sampling.max_new_tokens)
    interventions, tags = _prepared(reader, shelf, ask.ids, ask.lists, ask.chat)
    if ask.shade is not None:
        check_operations([Operation(ask.shade, "ablate", 0)], interventions.saved.sae.d_sae, "shade")
    engine = Engine(
        reader.model,
        reader.tokenizer,
        interventions,
        ask.sampling,
        slots=max(SLOTS, len(ask.lists)),
        tags=tags,
        weights=reader.weights,
        shade=ask.shade,
    )
    seed = (ask.sampling.seed, ask.sample)
    answers = [engine.take(Request(ask.ids, side, seed)) for side in range(len(ask.lists))]
    texts = [_Text(reader.tokenizer) for _ in answers]
    while not engine.is_done:
        ended = dict(engine.advance())
        for side, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            completion = ended.get(answer.number)
            known = len(answer.ids) if ask.shade is None else len(answer.values)
            ids = completion.token_ids if completion else answer.ids[:known]
            for n in range(text.tokens, len(ids)):
                is_last = completion is not None and n == len(ids) - 1
                value = answer.values[n] if n < len(answer.values) else None
                yield Written(side, ids[n], text.next(ids[: n + 1], is_last), value)
            if completion:
                if rest := completion.text[len(text.given) :]:
                    yield Written(side, None, rest, None)
                yield End(side, completion)


class _Text:
    """The text of an answer, in pieces that the tokens after them do not change."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.given, self.tokens = tokenizer, "", 0
        self.unsure = CLEANED if tokenizer.clean_up_tokenization_spaces else 0

    def next(self, ids: Sequence[int], is_last: bool) -> str:
        """What the last of all tokens so far adds, and what was held back before it."""
        self.tokens = len(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if not is_last:
            if BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(ids[-1]) or ""):
                return ""
            text = text.rstrip(HALF)
            text = text[: len(text) - self.unsure]
        if not text.startswith(self.given):
            return ""
        piece, self.given = text[len(self.given) :], text
        return piece


@torch.inference_mode()
def logprobs(
    reader: Reader,
    shelf: Shelf,
    ids: Sequence[int],
    operations: Sequence[Operation],
    top: int,
    *,
    prompt: int | None = None,
    chat: bool | None = None,
) -> Logprobs:
    """How probable each token of a text is after those before it, and the `top` likeliest ones, one at least.

    `prompt` of the tokens are the prompt, all by default; operations take the others as generated. Memory: the logits
    (S, V), in the model's precision. Raises UserError as `write` does.
    """
    _check(reader, ids, 0)
    interventions, tags = _prepared(reader, shelf, ids, [operations], chat)
    operator = Operator(interventions)
    reading = Reading(effective(operations), len(ids) if prompt is None else prompt, tags)
    operator.expect([(reading, ids)])
    ids_1S = torch.tensor([ids], device=reader.model.device)
    with reader.weights(), reader.model.changed(interventions.saved.hook, operator):
        logits_SV = reader.causal(ids_1S, use_cache=False).logits[0]
    of, tokens, likeliest = [], [], []
    after = [*ids[1:], 0]  # of place S there is no token
    for first in range(0, len(ids), PLACES_AT_ONCE):
        log_SV = torch.log_softmax(logits_SV[first : first + PLACES_AT_ONCE].float(), 1)
        given = torch.tensor(after[first : first + PLACES_AT_ONCE], device=log_SV.device)
        of.append(log_SV.gather(1, given[:, None])[:, 0].cpu())
        best = log_SV.topk(min(max(1, top), log_SV.shape[1]), 1)
        tokens.append(best.indices.cpu())
        likeliest.append(best.values.cpu())
    of_S, top_id_SK, top_SK = (torch.cat(parts).numpy() for parts in (of, tokens, likeliest))
    none_1K = np.full((1, top_SK.shape[1]), np.nan, np.float32)
    return Logprobs(
        np.concatenate([none_1K[0, :1], of_S[:-1]]),
        np.concatenate([np.full(none_1K.shape, -1), top_id_SK]),
        np.concatenate([none_1K, top_SK]),
    )


def _check(reader: Reader, ids: Sequence[int], new: int) -> None:
    """Raise UserError for tokens that the model cannot read, before a GPU gets to see them."""
    rows = reader.causal.get_input_embeddings().weight.shape[0]
    if not ids:
        raise UserError("the prompt is empty; give it text")
    if beyond := [token for token in ids if not 0 <= token < rows]:
        raise UserError(f"the prompt has the token {beyond[0]}; this model has {rows:,}, 0 to {rows - 1}")
    if len(ids) > reader.limit:
        raise UserError(f"the prompt has {len(ids):,} tokens; {reader.limit:,} at most are read here; shorten it")
    check_lengths([ids], new, reader.positions)


def _prepared(
    reader: Reader, shelf: Shelf, ids: Sequence[int], lists: Sequence[Sequence[Operation]], chat: bool | None
) -> tuple[Interventions, Tags | None]:
    """The lists with what they need of the SAE; and the tags of thinking, where one is about it."""
    saved, maxima = reader.sae(shelf), {}
    for operations in lists:
        check_operations(operations, saved.sae.d_sae, "operations")
        for feature in (operation.feature for operation in operations if operation.op in ("add", "set")):
            maxima[feature] = shelf.activity.largest(feature)
            if not maxima[feature]:
                raise UserError(
                    f"operations: feature {feature} fires on none of the held-out rows, so its largest activation is "
                    "unknown; ablate or scale it, or choose another"
                )
    is_about_thinking = any(operation.where == "thinking" for operations in lists for operation in operations)
    tags = thinking_tags(reader.tokenizer, [ids], chat) if is_about_thinking else None
    return Interventions(saved, maxima, lists), tags
