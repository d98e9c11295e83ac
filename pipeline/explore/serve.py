"""`pipeline explore`: finds the SAEs, takes a port, and serves until Ctrl-C.

The port is taken first, so that one in use is said at once. The model loads behind: pages are there meanwhile, and what
asks the model waits for it.
"""

import contextlib
import errno
import ipaddress
import os
import resource
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from harvest.files import UserError
from pipeline.explore.safety import Access, Protocol
from pipeline.stages import Runs

HERE = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 20  # without --port: the first that is free of so many
FILES = 16_384  # open ones, connections among them; many systems allow 1,024 unless a program asks for more
IDLE_S = 30  # after which a connection is closed that nothing is asked on


def serve(
    sweep: Sequence[Runs],
    config_file: Path,
    overrides: Sequence[str],
    host: str = HERE,
    port: int | None = None,
    browse: bool | None = None,
) -> None:
    """Serve the finished SAEs of these settings until Ctrl-C, which ends the process.

    `browse` opens a browser; None does where there is a desktop.
    Raises UserError where none is finished, and for a host or port that cannot be had.
    """
    with contextlib.closing(listening(host, port)) as sock:
        from pipeline.explore.catalog import find_entries, open_shelves

        entries = find_entries(sweep)
        print(f"explore: loading {', '.join(entry.title for entry in entries)}", flush=True)
        from pipeline.explore.app import make_app
        from pipeline.explore.explorer import Explorer, about_model
        from pipeline.explore.reading import Reader
        from pipeline.explore.steering_command import Origin

        origin = Origin(config_file, overrides, sweep[0].root, sweep)
        about = about_model(sweep[0])
        load = partial(Reader.load, entries, about.tokenizer if about else None)
        explorer = Explorer(open_shelves(entries), about, load, origin)
        access = access_of(host, sock)
        url = address(host, sock, access.token)

        def started() -> None:
            print(f"{url}\nCtrl-C ends it", flush=True)
            if has_desktop() if browse is None else browse:
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        run(make_app(explorer, access), sock, started)
    # At once: Python's own end takes seconds with torch loaded, and may crash beside a step of the model.
    sys.stdout.flush()
    os._exit(0)


def listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens at a host's first address; without a port at the first free one.

    Raises UserError for a host that is not this machine's, and for a port that is given and cannot be had.
    """
    try:
        family, *_, place = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: {host!r}: no address is known of it: {error}") from None
    tried = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for each in [*tried, *([0] if port is None else [])]:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((place[0], each, *place[2:]))
            sock.listen(1024)  # at once: until then another explorer could take the port as well
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host: {host}: not an address of this machine; --host 0.0.0.0 takes all") from None
            if port is not None:
                way = "in use; give another, or leave --port out" if error.errno == errno.EADDRINUSE else error.strerror
                raise UserError(f"--port: {port}: {way}") from None
        else:
            return sock
    raise UserError(f"--host: {host}: no port is free there")


def access_of(host: str, sock: socket.socket) -> Access:
    """Who may ask: without a token only where nobody else can connect."""
    place, port, *_ = sock.getsockname()
    found = ipaddress.ip_address(place.partition("%")[0])
    names = {host.lower()}
    if found.is_unspecified:
        names.add(socket.gethostname().lower())
    token = None if found.is_loopback else secrets.token_urlsafe(24)
    return Access(frozenset(names), found.is_unspecified, token, f"explore-{port}")


def address(host: str, sock: socket.socket, token: str | None) -> str:
    """What a browser is given."""
    place, port, *_ = sock.getsockname()
    name = socket.gethostname() if ipaddress.ip_address(place.partition("%")[0]).is_unspecified else host
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/{f'?token={token}' if token else ''}"


def has_desktop() -> bool:
    """Whether a browser that is opened here would be seen by who started this."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class Server(uvicorn.Server):
    """uvicorn's, which says when it answers, and which Ctrl-C ends without an error."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._say_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._say_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Ends it; the signal is not raised again, as there is nothing to be said of it."""
        self.should_exit = True


def run(app: Any, sock: socket.socket, started: Callable[[], None]) -> None:
    """Serve an ASGI application until a signal, which ends what is under way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if hard < 0 else min(FILES, hard), hard))
    Server(settings(app), started).run(sockets=[sock])


def settings(app: Any) -> uvicorn.Config:
    """How uvicorn serves it: nothing of a request is logged, and nothing is believed that proxies say."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=0,
    )
