"""A language model's endpoint on 127.0.0.1, as much of OpenAI's protocol as one question needs; a test says what it
answers.

    with serving(answer) as server: ... server.url, server.answered

`answer` takes the messages, [{"role", "content"}], and gives the text, or a `Said` where more than a text is meant.
With `failing`, that share of the calls goes wrong, by the seed: 429, 500, a reply that is too late, a closed socket, a
body cut short. The call that asks whether anybody is there (asking.PROBE) is counted apart.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from evaluate.asking import PROBE

MODEL = "oracle"
FAILURES = ("429", "500", "late", "closed", "cut")


class Said(NamedTuple):
    text: str | None
    finish_reason: str = "stop"
    refusal: str | None = None


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[list[dict[str, str]]], str | Said]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.models = [MODEL]
        self.key: str | None = None  # the one that it takes; None takes all, and none
        self.failing, self.late_s, self.random = 0.0, 1.0, random.Random(0)
        self.delay_s = 0.0  # of every answer
        self.page: bytes | None = None  # what it answers to all, instead: a web page
        self.status: int | None = None  # of all replies, with `headers`
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []  # headers and body of all, in order
        self.answered: Counter[str] = Counter()  # whole answers sent, by body of the question
        self.under_way, self.most_under_way, self.probes = 0, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_arguments) -> None:
        """A client that was killed closes its socket."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def log_message(self, *_arguments) -> None:
        pass

    def reply(self, status: int, value: Any, cut: int = 0, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.wfile.flush()
        self.close_connection = True

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.reply(status, {"error": {"message": message, "code": status}}, **headers)

    def stopped(self) -> bool:
        """Whether the request got its reply already: it says nothing about the question."""
        server = self.server
        if server.page is not None:
            self.reply(200, server.page, Content_Type="text/html")
        elif server.status is not None:
            self.refuse(server.status, "as the test says", **server.headers)
        elif server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.refuse(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
        else:
            return False
        return True

    def do_GET(self) -> None:
        if not self.stopped():
            listed = [{"id": name, "object": "model"} for name in self.server.models]
            self.reply(200, {"object": "list", "data": listed}) if self.path == "/v1/models" else self.refuse(404, "")

    def do_POST(self) -> None:
        server = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with server.lock:
            server.requests.append((dict(self.headers), body))
            failure = server.random.choice(FAILURES) if server.random.random() < server.failing else ""
        if self.stopped():
            return
        if self.path != "/v1/chat/completions":
            self.refuse(404, "Not Found")
        elif body["model"] not in server.models:
            self.refuse(404, f"The model `{body['model']}` does not exist.")
        else:
            self.complete(raw.decode(), body["messages"], failure)

    def complete(self, question: str, messages: list[dict[str, str]], failure: str) -> None:
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        time.sleep(server.late_s if failure == "late" else server.delay_s)
        probe = messages == [{"role": role, "content": content} for role, content in PROBE.messages]
        said = Said("Yes.") if probe else server.answer(messages)
        said = Said(said) if isinstance(said, str) else said
        with server.lock:  # before the reply, after which the client may send its next call, or be killed
            server.under_way -= 1
            if probe:
                server.probes += not failure
            elif not failure:
                server.answered[question] += 1
        if failure == "closed":
            self.close_connection = True
        elif failure in ("429", "500"):
            self.refuse(int(failure), "too many requests" if failure == "429" else "internal error")
        else:
            message = {"role": "assistant", "content": said.text, "refusal": said.refusal}
            choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
            words = len((said.text or "").split())
            asked = sum(len(each["content"].split()) for each in messages)
            usage = {"prompt_tokens": asked, "completion_tokens": words, "total_tokens": asked + words}
            self.reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage}, 9 if failure else 0)


@contextmanager
def serving(answer: Callable[[list[dict[str, str]]], str | Said]) -> Iterator[Server]:
    """The server, running until the block ends."""
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
