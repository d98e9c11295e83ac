"""Answers of a steered model as OpenAI's protocol has them: in pieces up to a stop, or whole with probabilities."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from evaluate.operations import Operation
from evaluate.sampler import Sampling
from pipeline.explore.catalog import Shelf
from pipeline.explore.explorer import Explorer
from pipeline.explore.writing import Ask, Logprobs, Written, logprobs, write


class Question(NamedTuple):
    """What is to be answered, and by whom."""

    shelf: Shelf
    operations: tuple[Operation, ...]
    ids: list[int]  # of the prompt
    sampling: Sampling  # max_new_tokens may be 0: then the prompt is only read
    stops: Sequence[str] = ()  # texts that end the answer, and are no part of it
    sample: int = 0  # which of several answers to one prompt
    chat: bool | None = None  # whether the prompt is a conversation


class Piece(NamedTuple):
    """Text that was written; the last one, of no text, says why the answer ended."""

    text: str
    reason: str | None = None  # "stop" or "length"
    ids: Sequence[int] = ()  # at the end: all that were written


class Score(NamedTuple):
    """Natural logarithms of probabilities at a place of a text."""

    id: int  # the token there
    logprob: float | None  # None for the first of a text
    top: list[tuple[int, float]]  # the likeliest tokens, best first


class Answer(NamedTuple):
    """A whole answer."""

    text: str
    reason: str  # "stop" or "length"
    ids: Sequence[int]
    scores: list[Score]  # of prompt and answer, where they were asked for


class Stops:
    """Looks for the texts that end an answer, in text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.found = stops, "", False

    def take(self, text: str) -> str:
        """What can be given on: nothing that may be the beginning of a stop, nothing from a stop on."""
        self.held += text
        at = min((place for stop in self.stops if (place := self.held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.found = True
        else:
            longest = max(map(len, self.stops), default=1) - 1
            tails = range(max(0, len(self.held) - longest), len(self.held))
            at = next((n for n in tails if any(s.startswith(self.held[n:]) for s in self.stops)), len(self.held))
        given, self.held = self.held[:at], self.held[at:]
        return given


async def pieces(explorer: Explorer, asked: Question) -> AsyncGenerator[Piece, None]:
    """An answer as it is written. Raises UserError for what the model cannot do."""
    if not asked.sampling.max_new_tokens:
        yield Piece("", "length")
        return
    ask = Ask(asked.ids, [asked.operations], asked.sampling, sample=asked.sample, chat=asked.chat)
    stops, ids = Stops(asked.stops), []
    async with aclosing(explorer.stream(asked.shelf, lambda reader: write(reader, asked.shelf, ask))) as events:
        async for event in events:
            if not isinstance(event, Written):
                yield Piece(stops.held)
                yield Piece("", "stop" if event.completion.ended else "length", event.completion.token_ids)
                return
            ids += [event.id] if event.id is not None else []
            yield Piece(stops.take(event.text))
            if stops.found:
                yield Piece("", "stop", ids)
                return


async def answer(explorer: Explorer, asked: Question, top: int | None = None) -> Answer:
    """A whole answer, with the scores of prompt and answer where so many likeliest tokens are asked for."""
    if top is not None and asked.sampling.max_new_tokens == 1 and not asked.sampling.temperature and not asked.stops:
        return await _next_token(explorer, asked, top)
    texts, end = [], Piece("", "length")
    async with aclosing(pieces(explorer, asked)) as found:
        async for end in found:
            texts.append(end.text)
    scores = []
    if top is not None:
        ids = [*asked.ids, *end.ids]
        scores = _scores(await _logprobs(explorer, asked, ids, top), ids)
    return Answer("".join(texts), end.reason or "length", end.ids, scores)


async def _next_token(explorer: Explorer, asked: Question, top: int) -> Answer:
    """The same of the likeliest token alone, by the one pass that gives the scores: lm-eval asks for it thousands of
    times. It leaves out the last score, so that of the token is there also where the token ends the text."""
    found = await _logprobs(explorer, asked, asked.ids, max(1, top))
    token = int(found.top_id_SK[-1, 0])
    scores = _scores(found, [*asked.ids, token])
    reader = await explorer.reader()
    if token in reader.ends:
        return Answer("", "stop", [], scores)
    return Answer(reader.tokenizer.decode([token], skip_special_tokens=False), "length", [token], scores)


async def _logprobs(explorer: Explorer, asked: Question, ids: list[int], top: int) -> Logprobs:
    prompt = len(asked.ids)
    return await explorer.ask_model(
        asked.shelf,
        lambda reader: logprobs(reader, asked.shelf, ids, asked.operations, top, prompt=prompt, chat=asked.chat),
    )


def _scores(found: Logprobs, ids: Sequence[int]) -> list[Score]:
    """Of tokens, of which one more than were read may be given: the likeliest."""
    top = [
        list(zip(tokens, values, strict=True))
        for tokens, values in zip(found.top_id_SK.tolist(), found.top_SK.tolist(), strict=True)
    ]
    own = [*found.of_S.tolist(), *(values[0][1] for values in top[len(found.of_S) :])]
    return [Score(token, own[s] if s else None, top[s] if s else []) for s, token in enumerate(ids)]
