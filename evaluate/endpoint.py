"""An OpenAI-compatible endpoint over HTTP: one request, one reply, whatever happens on the way.

Python's own client sends it. huggingface_hub's InferenceClient calls nothing under HF_HUB_OFFLINE, not even a server on
this machine; without a key it sends the hub's token to any address; and a server that sends a byte now and then holds
it for ever. Redirects are not followed, as the key would go along; this machine is reached without a proxy.
"""

import contextlib
import json
import ssl
import time
import urllib.request
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cache
from http.client import HTTPException, IncompleteRead
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from evaluate.loopback import is_here
from evaluate.visible import visible
from harvest.files import UserError

BASE_URL, API_KEY = "explain.runtime.base_url", "explain.runtime.api_key_env"  # settings that errors name
MAX_BYTES = 16 << 20  # of a reply: an answer has some thousand
SHOWN = 200  # characters of what a server says in an error


class Endpoint(NamedTuple):
    """Where a language model answers, and how it is asked."""

    base_url: str  # as OpenAI's clients take it, mostly ending in /v1
    model: str
    api_key: str | None  # from the environment; in no file, log or error
    timeout_s: float  # of one call
    tries: int  # calls for one question, then it is given up
    parallel: int  # calls side by side

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"  # a traceback may show it


class Reply(NamedTuple):
    """What came back of a request."""

    status: int  # HTTP's; 0 where nothing came
    body: bytes = b""
    wait_s: float | None = None  # what Retry-After asks for
    location: str = ""  # where a redirect leads
    problem: str = ""  # why nothing came
    timed_out: bool = False
    is_there: bool = True  # False: no connection was made


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:  # noqa: ARG002
        return None  # the redirect is then the reply


def address(base_url: str, path: str = "") -> str:
    """The URL of a path of the API; an address of a host alone gets /v1."""
    url = base_url.rstrip("/").removesuffix("/chat/completions")
    return (url if urlsplit(url).path else f"{url}/v1") + path


def check_settings(endpoint: Endpoint) -> None:
    """Raise UserError for an address or a key that no request can be made with."""
    url = endpoint.base_url
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is none is a ValueError
        host = host and host.encode("idna")
    except ValueError:
        parts, host = urlsplit(""), None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or parts.query or not is_plain:
        raise UserError(f"{BASE_URL}: {visible(url)!r}: no address; it looks like http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise UserError(f"{BASE_URL}: holds a user name or password; give the key by the variable of {API_KEY}")
    if endpoint.api_key and not (endpoint.api_key.isascii() and endpoint.api_key.isprintable()):
        raise UserError(f"{API_KEY}: the variable holds characters that no key has, a line end perhaps; set it anew")


def send(endpoint: Endpoint, path: str, payload: dict[str, Any] | None = None) -> Reply:
    """POST the payload as JSON to a path of the API, or GET it without one."""
    url = address(endpoint.base_url, path)
    headers = {"Accept": "application/json", "User-Agent": "reasoning-sae"}
    if payload is not None:
        headers["Content-Type"] = "application/json"
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    data = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data, headers)
    until, connected = time.monotonic() + endpoint.timeout_s, False
    try:
        try:
            response: Any = _opener(url).open(request, timeout=endpoint.timeout_s)
        except HTTPError as error:
            response = error
        with response:
            connected, about = True, response.headers
            body = _read(response, until)
            return Reply(response.status, body, _seconds(about), about.get("Location", ""))
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib wraps what happens before the headers
        timed_out = isinstance(reason, TimeoutError)
        problem = f"none within {endpoint.timeout_s:g} s" if timed_out else _clause(endpoint, reason)
        dropped = connected or isinstance(reason, ConnectionResetError | BrokenPipeError | HTTPException)
        return Reply(0, problem=problem, timed_out=timed_out, is_there=dropped or timed_out)


def said(endpoint: Endpoint, reply: Reply) -> str:
    """What a reply says, for an error: one line, fit to be shown, without the key."""
    text = reply.body[: 1 << 16].decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        error = json.loads(reply.body)
        error = error.get("error", error.get("detail", error)) if isinstance(error, dict) else error
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return _clause(endpoint, text)


def _clause(endpoint: Endpoint, reason: object) -> str:
    text = str(getattr(reason, "strerror", None) or reason)
    if endpoint.api_key:
        text = text.replace(endpoint.api_key, "(the key)")
    line = " ".join(visible(text).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _opener(url: str) -> urllib.request.OpenerDirector:
    proxies = urllib.request.ProxyHandler({} if is_here(url) else None)  # None: those of the environment
    return urllib.request.build_opener(proxies, _NoRedirect, urllib.request.HTTPSHandler(context=_certificates()))


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads the system's certificates, 20 ms


def _read(response: Any, until: float) -> bytes:
    """The whole body; the socket's own time-out begins anew with every byte."""
    body = bytearray()
    while part := response.read1(1 << 16):
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(f"an answer of more than {MAX_BYTES >> 20} MiB")
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:  # read1 does not say that bytes are missing
        raise IncompleteRead(bytes(body), response.length)
    return bytes(body)


def _seconds(headers: Message) -> float | None:
    """Retry-After: seconds, or a date."""
    given = headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(given))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    return None
