"""Answers of mixed length at full use of the machine: a finished answer makes room for the next.

Each prompt is read alone; then one token of every slot is computed at a time, always in the shape of all slots, and
what empty ones give is thrown away. So an answer is bit for bit the same whatever is written beside it, in whatever
order, and however much of it is left: it depends on the model, its request, the number of slots and the numerics. That
costs whole steps for the last answers. transformers' continuous batching packs all texts into one row instead, where
bits depend on what else is in it, and on a CPU that is slower (benchmarks/results.md).

A model that keeps more than keys and values (recurrent states, say) writes one answer after another with `generate`.

What the operations saw is counted, and compared with what they must have seen: they hold for every token that is read.

Shape suffixes: B slots or texts, S tokens, D d_in, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache

from evaluate.layer_step import same_step
from evaluate.operations import Interventions, Operator, Reading, Tags, effective
from evaluate.packed_weights import PackedWeights
from evaluate.prompts import check_lengths, position_limit, thinking_tags
from evaluate.sampler import Draw, Sampling, chosen
from evaluate.slot_cache import SlotCache, fits, fixed_attention
from harvest.files import UserError, enough_memory, is_out_of_memory
from harvest.language_model import HookedModel


class Request(NamedTuple):
    """What is to be answered."""

    ids: list[int]  # tokens of the prompt, as `prompt_ids` gives them
    operations: int  # which of `Interventions.lists`
    seed: tuple[int, ...]  # of its noise, as (seed, problem, sample): one seed, one noise, whatever the operations


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    token_ids: list[int]  # without the token that ends it
    ended: bool  # before max_new_tokens
    processed: int  # positions that the model read: prompt and answer, without the last token that it wrote
    changed: int  # of these, where an operation was done


def end_tokens(causal: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    own = causal.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


@dataclass
class Answer:
    """What is written so far; grows with each step until it ends, or is cancelled."""

    number: int
    request: Request
    reading: Reading
    ids: list[int] = field(default_factory=list)  # with the token that ends it
    values: list[float] = field(default_factory=list)  # of the shaded feature at those of them that the model read

    @property
    def draw(self) -> Draw:
        """The noise of its next token."""
        return Draw(self.request.seed, len(self.ids))


class _Prompt(NamedTuple):
    """A prompt that was read, for its samples."""

    ids: list[int]
    operations: int
    reading: Reading
    cache: Cache
    logits_1V: Tensor


class Engine:
    """Requests in, completions out as they end. Nothing of it runs between two calls."""

    def __init__(
        self,
        model: HookedModel,
        tokenizer: Any,
        interventions: Interventions,
        sampling: Sampling,
        *,
        slots: int,
        tags: Tags | None = None,
        weights: PackedWeights | None = None,
        shade: int | None = None,
    ) -> None:
        """`tags` are needed for operations on thinking, `weights` are the model's where they are packed already.

        The activation of feature `shade` is read at each written token, before operations: a token's when the model
        reads it, to write the next. `sampling.seed` is not read: each request has its own.
        """
        self.model, self.tokenizer, self.sampling, self.tags = model, tokenizer, sampling, tags
        self.lists = [effective(operations) for operations in interventions.lists]
        self.hook, self.operator = interventions.saved.hook, Operator(interventions)
        self.causal: Any = model.model
        self.ends = end_tokens(self.causal, tokenizer)
        self.waiting: deque[Answer] = deque()
        self.slots: list[Answer | None] = [None] * slots
        self.cache = SlotCache(self.causal, slots, model.device) if fits(self.causal) else None
        self.weights = weights or PackedWeights(self.causal, model.device)
        self.layer_step = same_step(model, self.hook, self.weights, slots) if self.cache is not None else None
        self.shade, self.shaded_B1 = shade, torch.empty(slots, 1)
        self.prompt: _Prompt | None = None  # the last one read
        self.count = 0

    def add(self, request: Request) -> int:
        """Take a request, those with the same prompt and operations best one after another; its number."""
        return self.take(request).number

    def take(self, request: Request) -> Answer:
        """The same; the answer to look at while it is written."""
        reading = Reading(self.lists[request.operations], len(request.ids), self.tags)
        self.waiting.append(Answer(self.count, request, reading))
        self.count += 1
        return self.waiting[-1]

    def cancel(self, number: int) -> None:
        """Forget a request that has not ended."""
        self.waiting = deque(answer for answer in self.waiting if answer.number != number)
        for slot, answer in enumerate(self.slots):
            if answer and answer.number == number:
                self._leave(slot)

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return not self.waiting and not any(self.slots)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Read prompts into the slots that are free, write a token of every slot; numbers and answers that ended.

        Raises UserError where the model did not pass the hook at every position.
        """
        ended = []
        while self._is_next_a_prompt:
            ended += self._begin()
        return ended + self._go_on()

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, Completion]]:
        """The same in as small parts as there are: read one prompt, or else write a token of every slot."""
        return self._begin() if self._is_next_a_prompt else self._go_on()

    @property
    def _is_next_a_prompt(self) -> bool:
        return self.cache is not None and bool(self.waiting) and None in self.slots

    def _begin(self) -> list[tuple[int, Completion]]:
        """Read a prompt into a slot that is free, and write its first token."""
        assert self.cache is not None
        answer, slot = self.waiting.popleft(), self.slots.index(None)
        prompt = self._read(answer)
        if self._put(answer, chosen(prompt.logits_1V, self.sampling, [answer.draw])[0]):
            return [self._completion(answer)]
        self.slots[slot] = answer
        self.cache.put(slot, prompt.cache, len(prompt.ids))
        return []

    def _go_on(self) -> list[tuple[int, Completion]]:
        """Write a token of every slot."""
        if self.cache is None:
            return [self._write_alone(self.waiting.popleft())] if self.waiting else []
        if not any(self.slots):
            return []
        ended = []
        tokens = chosen(self._decode(), self.sampling, [answer and answer.draw for answer in self.slots])
        for slot, token in enumerate(tokens):
            answer = self.slots[slot]
            if answer and self._put(answer, token):
                ended.append(self._completion(answer))
                self._leave(slot)
        return ended

    def _leave(self, slot: int) -> None:
        assert self.cache is not None
        self.slots[slot] = None
        self.cache.free(slot)

    def _put(self, answer: Answer, token: int) -> bool:
        """Write a token; whether the answer ends."""
        answer.ids.append(token)
        return token in self.ends or len(answer.ids) == self.sampling.max_new_tokens

    def _read(self, answer: Answer) -> _Prompt:
        """Read a prompt alone, unless it was the last one read."""
        ids, operations = answer.request.ids, answer.request.operations
        if self.prompt is None or (self.prompt.ids, self.prompt.operations) != (ids, operations):
            self.prompt = None
            cache = DynamicCache()
            only = {"logits_to_keep": 1} if self.causal._supports_logits_to_keep() else {}
            self.operator.expect([(answer.reading, ids)])
            logits_1V = self._pass([ids], past_key_values=cache, use_cache=True, **only)
            self.prompt = _Prompt(ids, operations, answer.reading, cache, logits_1V)
        answer.reading = copy(self.prompt.reading)
        return self.prompt

    def _decode(self) -> Tensor:
        """Logits (B, V) behind the last token of every slot."""
        assert self.cache is not None
        used = [self.slots[slot] for slot in self.cache.close_gaps()]
        self.slots = [*used, *[None] * (len(self.slots) - len(used))]
        last = [answer.ids[-1] if answer else 0 for answer in self.slots]
        self.operator.expect(
            [(answer.reading, [token]) if answer else None for answer, token in zip(self.slots, last, strict=True)]
        )
        ids, ready = [[token] for token in last], self.cache.ready()
        with fixed_attention(self.model.device):
            if self.layer_step:
                ids_B1 = torch.tensor(ids, device=self.model.device)
                logits_BV = self.layer_step(ids_B1, self.cache, ready, self._changed)
            else:
                logits_BV = self._pass(ids, **ready)
        self.cache.passed()
        self._note(self.slots)
        return logits_BV

    def _pass(self, ids: list[list[int]], **keywords: Any) -> Tensor:
        ids_BS = torch.tensor(ids, device=self.model.device)
        with self.weights(), self.model.changed(self.hook, self._changed):
            return self.causal(ids_BS, **keywords).logits[:, -1]

    def _changed(self, acts_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        if self.shade is not None:
            self.shaded_B1 = self.operator.sae.columns(acts_BSD[:, -1], [self.shade])
        return self.operator(acts_BSD, ids_BS)

    def _note(self, answers: Sequence[Answer | None]) -> None:
        """Keep the shaded feature's activation at the last token of each answer in a pass."""
        if self.shade is not None:
            for answer, (value,) in zip(answers, self.shaded_B1.tolist(), strict=True):
                if answer:
                    answer.values.append(value)

    def _write_alone(self, answer: Answer) -> tuple[int, Completion]:
        """A whole answer by transformers' `generate`, with whatever the model keeps of its text."""

        class Chosen(LogitsProcessor):
            def __call__(_self, _input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: N805
                (token,) = chosen(scores, self.sampling, [answer.draw])
                self._put(answer, token)
                only = torch.full_like(scores, -torch.inf)
                only[:, token] = 0
                return only

        def change(acts_BSD: Tensor, ids_BS: Tensor) -> Tensor:
            self.operator.expect([(answer.reading, ids_BS[0].tolist())])
            new_BSD = self._changed(acts_BSD, ids_BS)
            if answer.ids:
                self._note([answer])
            return new_BSD

        # The model's own defaults (temperature, penalties) would fill what is not set here.
        self.causal.generation_config = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=next(iter(sorted(self.ends)), 0),
        )
        ids_1S = torch.tensor([answer.request.ids], device=self.model.device)
        asked = {"attention_mask": torch.ones_like(ids_1S), "logits_processor": LogitsProcessorList([Chosen()])}
        try:
            with self.model.changed(self.hook, change):
                self.causal.generate(ids_1S, **asked)
        except Exception as error:  # of any kind: architectures that read a text, but do not go on with it
            if is_out_of_memory(error):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{type(self.causal).__name__} does not generate text: {first}") from None
        return self._completion(answer)

    def _completion(self, answer: Answer) -> tuple[int, Completion]:
        ended = answer.ids[-1] in self.ends
        ids = answer.ids[:-1] if ended else answer.ids
        expected, processed = answer.reading.prompt + len(answer.ids) - 1, answer.reading.processed
        if processed != expected:
            raise UserError(
                f"{self.hook}: the model read {expected:,} tokens of a sequence, and {processed:,} passed the hook: it "
                "runs this layer in another way while it generates, so nothing that is done there holds; take another "
                "hook"
            )
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return answer.number, Completion(text, ids, ended, processed, answer.reading.changed)


def answers(
    model: HookedModel,
    tokenizer: Any,
    interventions: Interventions,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    slots: int = 32,
    chat: bool | None = None,
    weights: PackedWeights | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Numbers of the requests and their completions, in the order in which they end.

    Requests with the same prompt and operations share its reading if they come one after another. `chat` is that of
    `prompt_ids`, `weights` are the model's where they are packed already. Raises UserError for prompts too long for the
    model, for operations on thinking where that is not known, where the model did not pass the hook at every position,
    and out of memory.
    """
    causal: Any = model.model
    ids = [request.ids for request in requests]
    check_lengths(ids, sampling.max_new_tokens, position_limit(causal.config))
    thinks = any(operation.where == "thinking" for operations in interventions.lists for operation in operations)
    tags = thinking_tags(tokenizer, ids, chat) if thinks else None
    less = (
        f"out of memory while {slots} answers are written at once; lower their number (benchmark.slots), or "
        f"max_new_tokens ({sampling.max_new_tokens:,})"
    )
    with enough_memory(less):
        engine = Engine(model, tokenizer, interventions, sampling, slots=slots, tags=tags, weights=weights)
    for request in requests:
        engine.add(request)
    while not engine.is_done:
        with enough_memory(less):
            ended = engine.step()
        yield from ended
