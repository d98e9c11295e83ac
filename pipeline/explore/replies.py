"""What is sent back: JSON, errors as one sentence, and events as they come; work ends where its client hangs up."""

import asyncio
import json
import sys
import traceback
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from harvest.files import UserError

T = TypeVar("T")

OF_OPENAI = "/v1/"  # below it errors have OpenAI's form
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
OWN_FAULT = "an error of the explorer's own; its terminal says which"


class Refused(Exception):  # noqa: N818  # whoever asks may be in the wrong
    """A request that is not answered: the status, and the one sentence that is said instead."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, dict(headers or {})


class HungUp(Exception):  # noqa: N818  # as anybody may
    """The client is gone, so nobody hears an answer."""


class Json(Response):
    """A JSON answer. NaN and infinity are no JSON: whoever gives one must say null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return dumped(content)


def dumped(content: Any) -> bytes:
    """JSON on one line, UTF-8; what is half a character, as a file's name may hold it, is a question mark."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def error_body(path: str, status: int, sentence: str) -> dict[str, Any]:
    """An error as its reader expects it."""
    if not path.startswith(OF_OPENAI):
        return {"error": sentence}
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}


def refusal(path: str, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that is refused."""
    return Json(error_body(path, status, sentence), status, headers)


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, its request's body being read; the work is cancelled where the client hangs up.

    Raises HungUp then.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Lines `data: ...` as they are made (text/event-stream); their making ends with the client."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(lines)
        self.lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        async with aclosing(self.lines):
            await super().__call__(scope, receive, send)


async def begun(receive: Receive, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same items, the first of them made: what is wrong with a request shows before its answer has begun."""
    try:
        first = await while_there(receive, anext(items, None))
    except BaseException:
        await items.aclose()
        raise
    return _from(first, items)


async def _from(first: T | None, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(items):
        if first is not None:
            yield first
        async for item in items:
            yield item


async def event_lines(path: str, items: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    """Items as events, of which one that fails is the last, as an error."""
    try:
        async with aclosing(items):
            async for item in items:
                yield _event(item)
    except UserError as error:
        yield _event(error_body(path, 400, str(error)))
    except Refused as refused:
        yield _event(error_body(path, refused.status, str(refused)))
    except Exception:
        traceback.print_exc(file=sys.stderr)
        yield _event(error_body(path, 500, OWN_FAULT))


def _event(item: Any) -> bytes:
    return b"data: " + dumped(item) + b"\n\n"
