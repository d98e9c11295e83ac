"""/v1 in OpenAI's form, so that clients that know nothing of features talk to a steered model.

The operations are a field of the body, or stand in the model's name: smollm2-135m+123:set:2:thinking+45:ablate. Answers
to one request are written one after another, each as it would be alone: what a seed gives depends on nothing that
others ask. A request whose answer would not be what it asks for is refused.
"""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from evaluate.operations import Operation
from evaluate.sampler import Sampling
from pipeline.explore.catalog import Shelf
from pipeline.explore.explorer import NO_MODEL, Explorer, operations_of
from pipeline.explore.openai_answers import Question, Score, answer, pieces
from pipeline.explore.openai_requests import Asked, chat_asked, completion_asked
from pipeline.explore.replies import Events, Json, Refused, begun, event_lines, while_there
from pipeline.explore.requests import NEW_TOKENS, OperationAsked, complaint, parsed
from pipeline.settings_text import SettingsError
from pipeline.steer import operations_of as operations_of_texts


class Form(NamedTuple):
    """What tells answers in a conversation from those to texts."""

    id: str
    whole: str
    chunk: str  # of a stream
    choice: Callable[[int, str, str | None, Any], dict[str, Any]]  # number, text, reason, logprobs
    delta: Callable[[int, str, str | None, bool], dict[str, Any]]  # number, text, reason, whether it is the first


def _text_choice(number: int, text: str, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": number, "text": text, "finish_reason": reason, "logprobs": logprobs or None}


def _chat_choice(number: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": number, "message": message, "finish_reason": reason, "logprobs": logprobs}


def _chat_delta(number: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    return {"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}


TEXT = Form("cmpl", "text_completion", "text_completion", _text_choice, _text_choice)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_delta)


class Endpoints:
    """/v1."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer

    def listed(self) -> list[Route]:
        """All of them."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def models(self, _request: Request) -> Response:
        """The model, once for each SAE; who asks puts operations behind the name."""
        return Json({"object": "list", "data": [_model(name) for name in self._names()]})

    async def model(self, request: Request) -> Response:
        """A model by its name, operations included."""
        name = request.path_params["name"]
        await self._steered(name, [])
        return Json(_model(name))

    async def completions(self, request: Request) -> Response:
        """What the model writes after texts, or after tokens."""
        asked = completion_asked(parsed(await request.body()))
        shelf, operations = await self._steered(asked.model, asked.operations)
        rows = [await self._ids(shelf, prompt) for prompt in asked.prompts]
        sampling = _sampling(asked, asked.max_tokens)
        questions = [
            Question(shelf, operations, ids, sampling, asked.stops, sample, False)
            for ids in rows
            for sample in range(asked.n)
        ]
        return await self._answered(request, TEXT, asked, questions, asked.logprobs, asked.echo)

    async def chat(self, request: Request) -> Response:
        """What the model answers in a conversation. Raises Refused for one that leaves no room for an answer."""
        asked = chat_asked(parsed(await request.body()))
        shelf, operations = await self._steered(asked.model, asked.operations)
        messages = [each.model_dump() for each in asked.messages]
        ids = await self.explorer.ask_model(shelf, lambda reader: reader.prompt_ids(messages, True))
        positions = self.explorer.about.positions if self.explorer.about else None
        room = min(NEW_TOKENS, positions - len(ids)) if positions else NEW_TOKENS
        if room < 1:
            raise Refused(400, f"messages: {len(ids):,} tokens; the model has {positions:,} positions; shorten them")
        given = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        sampling = _sampling(asked, room if given is None else given)
        questions = [Question(shelf, operations, ids, sampling, asked.stops, n, True) for n in range(asked.n)]
        return await self._answered(request, CHAT, asked, questions, asked.top_logprobs if asked.logprobs else None)

    async def _answered(
        self,
        request: Request,
        form: Form,
        asked: Asked,
        questions: Sequence[Question],
        top: int | None,
        echo: bool = False,
    ) -> Response:
        about = {
            "id": f"{form.id}-{secrets.token_hex(12)}",
            "object": form.chunk if asked.stream else form.whole,
            "created": int(time.time()),
            "model": asked.model or self._names()[0],
            "system_fingerprint": questions[0].shelf.entry.runs.fingerprints["train"],
        }
        echoed = [q.shelf.language.joined(q.ids) if echo else "" for q in questions]
        if asked.stream:
            chunks = self._chunks(about, form, asked, questions, echoed)
            return Events(_done(event_lines(request.url.path, await begun(request.receive, chunks))))

        async def whole() -> dict[str, Any]:
            found = [await answer(self.explorer, question, top) for question in questions]
            choices = []
            for n, (question, each) in enumerate(zip(questions, found, strict=True)):
                first = 0 if echo else len(question.ids)
                scores = (_chat_scores if form is CHAT else _text_scores)(question, each.scores[first:], top)
                choices.append(form.choice(n, echoed[n] + each.text, each.reason, scores))
            return about | {"choices": choices, "usage": _usage(questions, sum(len(each.ids) for each in found))}

        return Json(await while_there(request.receive, whole()))

    async def _chunks(
        self, about: dict[str, Any], form: Form, asked: Asked, questions: Sequence[Question], echoed: Sequence[str]
    ) -> AsyncGenerator[dict[str, Any], None]:
        written = 0
        for n, question in enumerate(questions):
            first = True
            async with aclosing(pieces(self.explorer, question)) as found:
                async for piece in found:
                    text = echoed[n] + piece.text if first else piece.text
                    if first or text or piece.reason:
                        yield about | {"choices": [form.delta(n, text, piece.reason, first)]}
                        first = False
                    written += len(piece.ids)
        if asked.stream_options.include_usage:
            yield about | {"choices": [], "usage": _usage(questions, written)}

    async def _ids(self, shelf: Shelf, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self.explorer.ask_model(shelf, lambda reader: reader.prompt_ids(prompt, False))
        vocabulary = await self.explorer.read_files(shelf, shelf.language.vocabulary)
        if (largest := max(prompt)) >= vocabulary:
            raise Refused(400, f"prompt: {largest}: the model has {vocabulary:,} tokens, 0 to {vocabulary - 1}")
        return prompt

    def _names(self) -> list[str]:
        """Names of the model, with the SAE's behind it but for the first."""
        if not self.explorer.about:
            return []
        name = self.explorer.about.name.rpartition("/")[2]
        return [name if n == 0 else f"{name}@{sae}" for n, sae in enumerate(self.explorer.shelves)]

    async def _steered(self, model: str, asked: Sequence[OperationAsked]) -> tuple[Shelf, tuple[Operation, ...]]:
        """The SAE and the operations of a model's name and a body. Raises Refused for a name that is not known."""
        if not self.explorer.about:
            raise Refused(404, NO_MODEL)
        name, *texts = model.split("+")
        base, _, sae = name.partition("@")
        own = self.explorer.about.name
        if base not in ("", own, own.rpartition("/")[2]) or (sae and sae not in self.explorer.shelves):
            known = ", ".join(self._names()[:20])
            raise Refused(404, f"model: {name[:80]!r}: no such model; one of {known}, with operations behind it")
        shelf = self.explorer.shelf(sae or None)

        def found() -> tuple[Operation, ...]:
            try:
                named = [OperationAsked(**each._asdict()) for each in operations_of_texts(texts)]
            except (SettingsError, ValidationError) as error:
                said = complaint(error) if isinstance(error, ValidationError) else str(error)
                raise Refused(400, f"model: {said.removeprefix('--feature: ')}") from None
            return operations_of([*named, *asked], shelf)

        return shelf, await self.explorer.read_files(shelf, found)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "reasoning-sae"}


def _sampling(asked: Asked, tokens: int) -> Sampling:
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    return Sampling(tokens, asked.temperature, asked.top_p, seed)


def _usage(questions: Sequence[Question], written: int) -> dict[str, int]:
    """Tokens; a prompt counts once, however many answers it has."""
    read = sum(len(question.ids) for question in questions if not question.sample)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _text_scores(question: Question, scores: Sequence[Score], top: int | None) -> dict[str, Any] | None:
    """As /v1/completions has them: of a place also the token that is there, whether or not it is likely."""
    if top is None:
        return None
    texts, offsets, likeliest = [question.shelf.text(score.id) for score in scores], [0], []
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    for score, text in zip(scores, texts, strict=True):
        found: dict[str, float] = {}
        for token, value in score.top[:top]:
            found.setdefault(question.shelf.text(token), value)  # of tokens with one text the likeliest
        if score.logprob is not None:
            found.setdefault(text, score.logprob)
        likeliest.append(found or None)
    own = [score.logprob for score in scores]
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": likeliest, "text_offset": offsets[:-1]}


def _chat_scores(question: Question, scores: Sequence[Score], top: int | None) -> dict[str, Any] | None:
    """As /v1/chat/completions has them."""
    if top is None:
        return None

    def said(token: int, value: float | None) -> dict[str, Any]:
        text = question.shelf.text(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [
        said(score.id, score.logprob) | {"top_logprobs": [said(*each) for each in score.top[:top]]} for score in scores
    ]
    return {"content": content, "refusal": None}


async def _done(lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(lines):
        async for line in lines:
            yield line
    yield b"data: [DONE]\n\n"
