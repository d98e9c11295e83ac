"""Who may ask the explorer, and how much: checked before anything of a request is read by the rest of it.

A page of another site can make a browser send requests to 127.0.0.1, and, by DNS rebinding, read the answers under a
name of its own. So Host must be a name of this server, and what a browser says of a request's origin must be this
server's page. Programs send no Origin and pass. Where others on the network can connect, a token is asked for as well.

What is sent is bounded in size and in time: the head and the answer by `Protocol`, the body by `Guard`.
"""

import asyncio
import hmac
import ipaddress
import math
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

import h11
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.explore.replies import OWN_FAULT, Refused, refusal

BODY_BYTES = 1 << 20
HEAD_BYTES, HEAD_LINES, TARGET_BYTES = 32 << 10, 64, 4 << 10
HEAD_S, BODY_S, SEND_S = 10.0, 10.0, 30.0  # for the head, for the body, for a client to take some of an answer
AT_ONCE = 256  # requests that are under way
PROGRAMS = ("/api/", "/v1/", "/openapi.json", "/static/")  # never what a link of another site leads to

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


def headers(policy: dict[str, str] | None = None) -> dict[str, str]:
    """Headers of every answer; `policy` replaces directives of the content security policy."""
    directives = {**POLICY, **(policy or {})}
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in directives.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "cache-control": "no-store",
    }


class Access(NamedTuple):
    """Under which names the server is asked, and with which token."""

    names: frozenset[str] = frozenset()  # beside those of this machine's loopback; lower case
    addresses: bool = False  # any address is a name of it: it listens on all. No site's name is an address.
    token: str | None = None
    cookie: str = "explore"  # holds the token in a browser; cookies do not know ports, so each has its own name


class Guard:
    """Asks each request for its papers, then hands it on with its whole body."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access, self.under_way = app, access, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Whatever is raised behind it becomes an answer."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        outgoing = _Outgoing(send)
        self.under_way += 1
        try:
            if self.under_way > AT_ONCE:
                raise Refused(429, "too many requests at once; try again", {"retry-after": "1"})
            if welcome := self._check(scope):
                await welcome(scope, receive, outgoing)
                return
            body = await _whole_body(Headers(scope=scope), receive)
            await self.app(scope, _Again(body, receive), outgoing)
        except Refused as refused:
            if not outgoing.begun:
                # What was not read of the body must not be taken for the next request.
                more = {"connection": "close", **refused.headers}
                answer = refusal(scope["path"], refused.status, str(refused), more)
                await answer(scope, receive, outgoing)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not outgoing.begun:
                await refusal(scope["path"], 500, OWN_FAULT)(scope, receive, outgoing)
        finally:
            self.under_way -= 1

    def _check(self, scope: Scope) -> Response | None:
        """Raise Refused for a request that is not answered; an answer that hands a browser its token."""
        if len(scope["headers"]) > HEAD_LINES or sum(len(n) + len(v) for n, v in scope["headers"]) > HEAD_BYTES:
            raise Refused(431, f"the head of a request is at most {HEAD_LINES} lines and {HEAD_BYTES >> 10} KiB")
        if len(scope["raw_path"]) + len(scope["query_string"]) > TARGET_BYTES:
            raise Refused(414, f"an address is at most {TARGET_BYTES >> 10} KiB")
        found = Headers(scope=scope)
        check_host(found.getlist("host"), self.access)
        check_origin(scope, found)
        return self._check_token(scope, found) if self.access.token else None

    def _check_token(self, scope: Scope, found: Headers) -> Response | None:
        assert self.access.token
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        given = query.pop("token", None)
        if given is not None and scope["method"] == "GET" and is_same(given, self.access.token):
            where = scope["raw_path"].decode("ascii", "replace")
            # `//host` is another host, and to a browser `/\host` as well.
            there = "/" + where.lstrip("/\\") + (f"?{urlencode(query)}" if query else "")
            answer = Response(status_code=303, headers={"location": there})
            answer.set_cookie(self.access.cookie, self.access.token, httponly=True, samesite="lax")
            return answer
        tokens = [bearer(found.get("authorization", "")), cookie(found.get("cookie", ""), self.access.cookie)]
        if not any(is_same(each, self.access.token) for each in tokens):
            raise Refused(
                401,
                "this explorer asks for its token: open the address that it printed, or send `Authorization: Bearer`",
                {"www-authenticate": "Bearer"},
            )
        return None


def is_same(given: str | None, token: str) -> bool:
    """Whether it is the token, in a time that does not depend on where they differ."""
    return given is not None and hmac.compare_digest(given.encode(), token.encode())


def bearer(authorization: str) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def cookie(header: str, name: str) -> str | None:
    """A cookie's value."""
    # By hand: `http.cookies` finds none at all beside one whose name it forbids, and those of other ports come along.
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for key, _, value in pairs if key == name), None)


def check_host(hosts: Sequence[str], access: Access) -> None:
    """Raise Refused for a request to another name: one that some site's owner made lead here."""
    if len(hosts) != 1 or not is_own(name_of(hosts[0]), access):
        shown = ", ".join(host[:80] for host in hosts) or "none"
        raise Refused(421, f"Host: {shown}: not a name of this server; open the address that it printed")


def name_of(host: str) -> str:
    """The name of a Host header, lower case, without its port; empty where it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", host.lower())
    return (found[1] or found[2]) if found else ""


def is_own(name: str, access: Access) -> bool:
    """Whether a name is one of this server."""
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback or access.addresses or name in access.names
    return name == "localhost" or name in access.names


def check_origin(scope: Scope, found: Headers) -> None:
    """Raise Refused for what a page of another site asks; a link to a page of ours may be followed from anywhere."""
    site, origin = found.get("sec-fetch-site"), found.get("origin")
    is_link = found.get("sec-fetch-mode") == "navigate" and found.get("sec-fetch-dest") == "document"
    if scope["method"] == "GET" and is_link and not scope["path"].startswith(PROGRAMS):
        return
    if site not in (None, "none", "same-origin"):
        raise Refused(403, f"Sec-Fetch-Site: {site[:80]}: pages of other sites may not ask")
    # A page whose referrer policy is no-referrer may send `null` to itself; then the browser says same-origin.
    if origin not in (None, *(f"{scheme}://{found['host']}" for scheme in ("http", "https"))) and not (
        origin == "null" and site == "same-origin"
    ):
        raise Refused(403, f"Origin: {origin[:80]}: pages of other sites may not ask")


async def _whole_body(found: Headers, receive: Receive) -> bytes:
    """The body. Raises Refused for one that is too large, too slow, or of a form that is not read."""
    length = found.get("content-length")
    if length and (len(length) > 9 or not length.isdecimal() or int(length) > BODY_BYTES):
        raise Refused(413, f"a body is at most {BODY_BYTES >> 20} MiB")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(400, "the body ended early")
                body += message.get("body", b"")
                if len(body) > BODY_BYTES:
                    raise Refused(413, f"a body is at most {BODY_BYTES >> 20} MiB")
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_S:g} seconds") from None
    if body and found.get("content-encoding", "identity") != "identity":
        raise Refused(415, "Content-Encoding: only plain bodies are read")
    # A page of another site can send other types without asking first.
    if body and found.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Content-Type: a body is application/json")
    return bytes(body)


class _Again:
    """A body that was read, then whatever comes: that the client hung up."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Outgoing:
    """Puts the headers on every answer."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            own = {name for name, _ in message["headers"]}
            safe = [(n.encode(), v.encode()) for n, v in headers().items()]
            message = {**message, "headers": [*message["headers"], *(pair for pair in safe if pair[0] not in own)]}
        await self.send(message)


class Protocol(H11Protocol):
    """uvicorn's, which would wait for ever: for the head of a request, and for a client to take an answer, also where
    it closes a connection."""

    timer: asyncio.TimerHandle | None = None
    looking: asyncio.TimerHandle

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._wait()
        self._look(math.inf)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self.timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_waiting()
        self.looking.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _look(self, before: float) -> None:
        """End the connection where of what lies here to be sent nothing was taken since the last look."""
        left = self.transport.get_write_buffer_size()
        if left and left >= before:
            self.transport.abort()
        else:
            self.looking = self.loop.call_later(SEND_S, self._look, left or math.inf)
