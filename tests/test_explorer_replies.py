"""Answers of the explorer that end in an error, and those that it gives while it ends."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from explorer_server import StandInReader, StandInShelf, http, post, refused, serving

from harvest.files import UserError
from pipeline.explore.app import make_app
from pipeline.explore.explorer import About, Explorer
from pipeline.explore.replies import OWN_FAULT, Refused, event_lines
from pipeline.explore.safety import Access, Guard
from pipeline.explore.steering_command import Origin


@pytest.mark.parametrize(
    ("error", "path", "last"),
    [
        (UserError("prompt: is empty"), "/api/steer", {"error": "prompt: is empty"}),
        (Refused(410, "runs/evaluate/1: was deleted"), "/api/steer", {"error": "runs/evaluate/1: was deleted"}),
        (RuntimeError("/home/somebody/secret"), "/api/steer", {"error": OWN_FAULT}),
        (
            Refused(410, "was deleted"),
            "/v1/completions",
            {"error": {"message": "was deleted", "type": "invalid_request_error", "param": None, "code": None}},
        ),
    ],
)
def test_an_error_is_the_last_event(capfd, error, path, last):
    closed = []

    async def items():
        try:
            yield {"text": "so"}
            raise error
        finally:
            closed.append(True)

    async def lines():
        return [line async for line in event_lines(path, items())]

    found = asyncio.run(lines())
    assert all(line.startswith(b"data: ") and line.endswith(b"\n\n") for line in found)
    assert [json.loads(line.removeprefix(b"data: ")) for line in found] == [{"text": "so"}, last]
    assert closed
    assert ("secret" in capfd.readouterr().err) == isinstance(error, RuntimeError)


def asked(app: Any, kind: str) -> list[dict[str, Any]]:
    """What a guarded application sends."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": "GET", "path": "/api", "raw_path": b"/api", "query_string": b"", "scheme": "http"}
    scope["headers"] = [(b"host", b"localhost")]
    asyncio.run(Guard(app, Access())(scope, receive, send))
    return sent


def test_what_fails_behind_the_guard_is_an_answer(capfd):
    async def failing(_scope, _receive, _send):
        raise RuntimeError("/home/somebody/secret")

    start, body, *_ = asked(failing, "http")
    assert start["status"] == 500
    assert json.loads(body["body"]) == {"error": OWN_FAULT}
    assert "secret" in capfd.readouterr().err


def test_a_websocket_never_reaches_the_application():
    async def application(*_):
        raise AssertionError

    assert asked(application, "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_an_explorer_that_ends_says_so(finished):
    about = About("tiny", chat=True, thinking=True, positions=128)
    explorer = Explorer({"one": StandInShelf(finished)}, about, StandInReader, Origin(Path(), (), Path(), []))
    with serving(make_app(explorer, Access())) as url:
        assert post(url, "/api/features", {"text": "wait"}).status_code == 200
        explorer.close()
        assert refused(post(url, "/api/features", {"text": "wait"}), 503) == "the explorer is being closed"
        assert http.get(url).status_code == 200
