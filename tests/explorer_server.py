"""The explorer on a port of this machine, over stand-ins where a test needs no model."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import httpx
import numpy as np
from conftest import TINY

from evaluate.config import FeaturesConfig
from evaluate.feature_views import Views
from pipeline.config import load
from pipeline.explore import serve
from pipeline.explore.app import make_app
from pipeline.explore.catalog import Entry, find_entries, open_shelves
from pipeline.explore.explorer import About, Explorer, about_model
from pipeline.explore.features import FeatureTable
from pipeline.explore.reading import Read, Reader
from pipeline.explore.safety import Access
from pipeline.explore.steering_command import Origin
from pipeline.stages import find_runs

HOOK = "model.layers.1"
# httpx' functions, which would give a busy machine five seconds.
http = SimpleNamespace(**{n: partial(getattr(httpx, n), timeout=60) for n in ("get", "post", "stream", "options")})
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application as the command serves it, in a thread; gives its address."""
    sock = serve.listening("127.0.0.1", 0)
    ready = threading.Event()
    server = serve.Server(serve.settings(app), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def said(url: str, request: bytes, seconds: float = 10) -> bytes:
    """All that the server says to the bytes of a request, until it closes the connection."""
    found = b""
    with socket.create_connection(("127.0.0.1", port_of(url)), seconds) as connection, contextlib.suppress(OSError):
        connection.sendall(request)
        while piece := connection.recv(65536):
            found += piece
    return found


def refused(answer: httpx.Response, *statuses: int) -> str:
    """The sentence of an answer that is a refusal, safe to show."""
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    error = answer.json()["error"]
    sentence = error if isinstance(error, str) else error["message"]
    assert sentence
    assert "Traceback" not in sentence
    assert "\n" not in sentence
    return sentence


def post(url, path, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(url + path, content=content, headers={"content-type": "application/json", **headers})


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


class StandInShelf:
    """A shelf whose tokens, labels, sources and hook are text that tries to break pages."""

    def __init__(self, finished: Path, hook: str = hostile.HOOK, sae: str = "one") -> None:
        site, weighed = hostile.site(finished)
        site = site._replace(hook=hook)
        self.weighed, self.views = weighed, Views(site, FeaturesConfig())
        runs = SimpleNamespace(
            fingerprints={"train": "0" * 12},
            config=SimpleNamespace(harvest=SimpleNamespace(hooks=[hook])),
        )
        self.entry: Any = Entry(sae, hook, runs, hook)  # type: ignore
        self.activity, self.text = site.activity, site.text
        self.table = FeatureTable(site, ["reasoning"], lambda _tokens: {}, len(hostile.TOKENS))
        self.saved: Any = SimpleNamespace(sae=SimpleNamespace(d_sae=len(weighed)))
        self.language: Any = SimpleNamespace(vocabulary=lambda: len(hostile.TOKENS), unembedding=lambda: None)

    def view(self, feature: int) -> dict[str, Any]:
        return self.views.of(feature, self.weighed[feature])

    def about(self) -> dict[str, Any]:
        return {
            "id": self.entry.id,
            "title": self.entry.title,
            "hook": self.entry.hook,
            "kind": "standard",
            "d_in": 32,
            "d_sae": len(self.weighed),
            "sources": ["<b>reasoning"],
            "has": {"score": True, "injection": True, "labels": True},
        }

    def check(self) -> None:
        """Its runs are there."""


class StandInReader:
    """Reads a character as a token, and fires one feature at each."""

    ends = frozenset({2})

    def read(self, _shelf: Any, text: str, **_options: Any) -> Read:
        count = len(text)
        each = np.arange(count, dtype=np.int32) % 12
        ones = np.ones(count, np.float32)
        return Read(list(range(count)), list(text), None, np.ones(count, bool), np.arange(count + 1), each, ones)

    def prompt_ids(self, prompt: Any, _chat: bool | None = None) -> list[int]:
        return list(range(len(str(prompt))))


def stand_in(finished: Path, access: Access | None = None, **options: Any) -> Any:
    """An application over one such shelf."""
    explorer = Explorer(
        {"one": StandInShelf(finished, **options)},  # type: ignore[dict-item]
        About("tiny-llama", chat=True, thinking=True, positions=128),
        StandInReader,  # type: ignore[arg-type]
        Origin(Path("configs/tiny.yaml"), (), Path("runs"), []),
    )
    return make_app(explorer, access or Access())


def tiny_explorer(*overrides: str, config: Path = TINY) -> Explorer:
    """The explorer of the finished runs in the current folder, with their model."""
    sweep = find_runs(load(config, list(overrides)), Path("runs"))
    entries = find_entries(sweep)

    def reader() -> Reader:
        made = Reader.load(entries)
        made.tokenizer.chat_template = CHAT  # the tiny model has none
        return made

    about = about_model(sweep[0])
    about = about and about._replace(chat=True)
    return Explorer(open_shelves(entries), about, reader, Origin(config, overrides, Path("runs"), sweep))


def events(answer: httpx.Response) -> list[Any]:
    """What was sent as text/event-stream."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
