"""The explorer's pages and its endpoints for programs; `safety.Guard` stands before all of them.

What asks the model goes through the one desk, where requests take turns; what only reads files has threads of its own.
A client that hangs up ends what is done for it.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from evaluate.sampler import Sampling
from harvest.files import UserError
from pipeline.explore import pages
from pipeline.explore.cards import card
from pipeline.explore.catalog import Shelf
from pipeline.explore.explorer import Explorer, operations_of
from pipeline.explore.jobs import Busy, Closed
from pipeline.explore.openai_api import Endpoints
from pipeline.explore.openapi import description
from pipeline.explore.reading import Read, Reader, by_example, summed
from pipeline.explore.replies import OWN_FAULT, Events, HungUp, Json, Refused, begun, event_lines, refusal, while_there
from pipeline.explore.requests import (
    ExamplesAsked,
    FeaturesAsked,
    FindAsked,
    SteerAsked,
    checked,
    parsed,
)
from pipeline.explore.safety import Access, Guard
from pipeline.explore.steering_command import steering_command
from pipeline.explore.writing import Ask, Event, Written, write

T = TypeVar("T")

ARRAYS = "application/octet-stream"
SIDES = ("plain", "steered")


def make_app(explorer: Explorer, access: Access) -> ASGIApp:
    """The whole explorer as an ASGI application; the model is loaded when it starts."""

    @asynccontextmanager
    async def life(_app: Starlette) -> AsyncIterator[None]:
        explorer.start()
        try:
            yield
        finally:
            explorer.close()

    kinds = HTTPException, Refused, UserError, Busy, Closed, HungUp
    app = Starlette(
        routes=[*Routes(explorer).listed(), *Endpoints(explorer).listed()],
        exception_handlers={**dict.fromkeys(kinds, _refused), Exception: _failed},
        lifespan=life,
    )
    return Guard(app, access)


async def _refused(request: Request, error: Exception) -> Response:
    status, sentence, headers = 400, str(error), {}
    match error:
        case HTTPException():
            status, headers = error.status_code, dict(error.headers or {})
            sentence = {404: "there is nothing at this address", 405: "not with this method"}.get(status, error.detail)
        case Refused():
            status, headers = error.status, error.headers
        case Busy():
            status, headers = 429, {"retry-after": str(error.retry_after)}
            sentence = f"too many wait already; ask again in {error.retry_after} s"
        case Closed():
            status, sentence = 503, "the explorer is being closed"
        case HungUp():
            sentence = "the client hung up"
    return refusal(request.url.path, status, sentence, headers)


async def _failed(request: Request, _error: Exception) -> Response:
    return refusal(request.url.path, 500, OWN_FAULT)


class Routes:
    """Pages, their files, and /api."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer

    def listed(self) -> list[Route]:
        """All of them. No path of a file is made from an address: names of files are those of a fixed list."""
        return [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/feature/{sae}/{number:int}", self.feature_page),
            Route("/openapi.json", self.openapi),
            Route("/api/saes", self.saes),
            Route("/api/features", self.features, methods=["POST"]),
            Route("/api/find", self.find),
            Route("/api/find", self.find_by_example, methods=["POST"]),
            Route("/api/feature/{sae}/{number:int}", self.card),
            Route("/api/steer", self.steer, methods=["POST"]),
        ]

    async def page(self, _request: Request) -> Response:
        """The page with all views."""
        return HTMLResponse(pages.app_page())

    async def static(self, request: Request) -> Response:
        """A file of the pages. Raises Refused for a name that is not on the list."""
        asset = pages.assets().get(request.path_params["name"])
        if not asset:
            raise Refused(404, "there is no such file")
        tag = f'"{sha256(asset.body).hexdigest()[:16]}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)

    async def openapi(self, _request: Request) -> Response:
        """What this server answers, for programs."""
        return Json(description())

    async def feature_page(self, request: Request) -> Response:
        """The page of any feature."""

        def page(shelf: Shelf, number: int) -> str:
            entry, identity = shelf.entry, shelf.table.site.identity
            sources = identity.sources.tolist() if identity else ()
            return pages.feature_page(entry.id, entry.hook, shelf.saved.sae.d_sae, shelf.view(number), sources)

        return HTMLResponse(await self._of_feature(request, page))

    async def card(self, request: Request) -> Response:
        """What a small card of a feature shows."""
        return Json(await self._of_feature(request, card))

    async def _of_feature(self, request: Request, make: Callable[[Shelf, int], T]) -> T:
        shelf, number = self.explorer.shelf(request.path_params["sae"]), request.path_params["number"]

        def checked_first() -> T:
            if number >= shelf.saved.sae.d_sae:
                raise Refused(404, f"feature: {str(number)[:20]}: the SAE has {shelf.saved.sae.d_sae:,} features")
            return make(shelf, number)

        return await self.explorer.read_files(shelf, checked_first)

    async def saes(self, _request: Request) -> Response:
        """The SAEs that can be looked at, and what can be asked of them."""
        return Json(await self.explorer.in_thread(self.explorer.listed))

    async def features(self, request: Request) -> Response:
        """The features of a text: at each token, and of all of it."""
        asked = checked(FeaturesAsked, parsed(await request.body()))
        shelf, started = self.explorer.shelf(asked.sae), time.perf_counter()

        def look(reader: Reader) -> tuple[Read, list[dict[str, Any]]]:
            read = reader.read(shelf, asked.text, chat=asked.chat)
            return read, summed(read, shelf.table)

        read, lines = await while_there(request.receive, self.explorer.ask_model(shelf, look))
        if ARRAYS in request.headers.get("accept", ""):
            return Response(_arrays(read, shelf.entry.id), media_type=ARRAYS)
        found = _read(read) | {"sae": shelf.entry.id, "features": lines}
        return Json(found | {"ms": round(1000 * (time.perf_counter() - started), 1)})

    async def find(self, request: Request) -> Response:
        """Features that fit what is looked for, a page of them."""
        asked = checked(FindAsked, dict(request.query_params))
        shelf = self.explorer.shelf(asked.sae)
        found = await self.explorer.read_files(shelf, lambda: shelf.table.find(asked.query))
        return Json(found._asdict())

    async def find_by_example(self, request: Request) -> Response:
        """Features that fire on some texts, but not on others."""
        asked = checked(ExamplesAsked, parsed(await request.body()))
        shelf = self.explorer.shelf(asked.sae)

        async def read(texts: list[str]) -> list[Read]:
            """A job a text, so that others have their turn between them."""
            return [
                await self.explorer.ask_model(shelf, lambda reader, text=text: reader.read(shelf, text, within=True))
                for text in texts
            ]

        async def look() -> list[dict[str, Any]]:
            yes, no = await read(asked.yes), await read(asked.no)
            return await self.explorer.read_files(shelf, lambda: _rows(shelf, by_example(yes, no)[: asked.limit]))

        return Json({"features": await while_there(request.receive, look())})

    async def steer(self, request: Request) -> Response:
        """What the model answers as it is and under operations, token by token as it is written."""
        asked = checked(SteerAsked, parsed(await request.body()))
        shelf = self.explorer.shelf(asked.sae)
        operations = await self.explorer.read_files(shelf, lambda: operations_of(asked.operations, shelf))
        prompt = [each.model_dump() for each in asked.messages or ()] if asked.prompt is None else asked.prompt
        sampling = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p, asked.seed)
        lists = ((), operations) if operations else ((),)

        def ask(reader: Reader) -> Ask:
            return Ask(reader.prompt_ids(prompt, asked.chat), lists, sampling, shade=asked.shade, chat=asked.chat)

        async def events() -> AsyncGenerator[dict[str, Any], None]:
            async with aclosing(self.explorer.stream(shelf, lambda reader: write(reader, shelf, ask(reader)))) as found:
                async for event in found:
                    yield _event(event)
            same = partial(steering_command, self.explorer.origin, shelf, asked)
            yield {"done": True, "command": await self.explorer.read_files(shelf, same)}

        return Events(event_lines(request.url.path, await begun(request.receive, events())))


def _read(read: Read) -> dict[str, Any]:
    kept = len(read.ids)
    tokens = zip(read.ids, read.texts, read.kept_S.tolist(), strict=True)
    return {
        "tokens": [{"id": token, "text": text, "counts": counts} for token, text, counts in tokens],
        "cut": None if read.cut is None else {"tokens": read.cut, "kept": kept},
        "active": {
            "indptr": read.indptr_S1.tolist(),
            "feature": read.feature_N.tolist(),
            "value": np.round(read.value_N.astype(np.float64), 6).tolist(),
        },
    }


def _arrays(read: Read, sae: str) -> bytes:
    arrays = {
        "ids": np.array(read.ids, np.int64),
        "kept": read.kept_S,
        "indptr": read.indptr_S1,
        "feature": read.feature_N,
        "value": read.value_N,
    }
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"sae": sae})


def _rows(shelf: Shelf, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [shelf.table.row(line.pop("feature")) | line for line in lines]


def _event(event: Event) -> dict[str, Any]:
    if isinstance(event, Written):
        return {"side": SIDES[event.side], "id": event.id, "text": event.text, "value": event.value}
    completion = event.completion
    return {
        "side": SIDES[event.side],
        "end": True,
        "ended": completion.ended,
        "tokens": len(completion.token_ids),
        "processed": completion.processed,
        "changed": completion.changed,
    }
