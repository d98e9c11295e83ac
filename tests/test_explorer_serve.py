"""The explorer as a command: what it listens on, who is let in, and runs and models that are not there."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from conftest import CPU, ROOT, only, pipeline, start
from explorer_server import HOOK, http, post, refused, serving, tiny_explorer

from harvest.files import UserError
from pipeline.explore import serve
from pipeline.explore.app import make_app
from pipeline.explore.explorer import Explorer
from pipeline.explore.safety import Access

LONG = {"prompt": "wait", "max_new_tokens": 100, "temperature": 1, "seed": 1}


@pytest.mark.parametrize(("hard", "asked"), [(-1, serve.FILES), (4096, 4096), (1 << 20, serve.FILES)])
def test_it_asks_for_as_many_open_files_as_it_may_have(monkeypatch, hard, asked):
    found, has = [], iter([(1024, hard), (serve.FILES, hard)])
    monkeypatch.setattr(serve.resource, "getrlimit", lambda _which: next(has))
    monkeypatch.setattr(serve.resource, "setrlimit", lambda _which, limits: found.append(limits))
    monkeypatch.setattr(serve, "Server", lambda *_: SimpleNamespace(run=lambda sockets: None))
    for _ in range(2):
        serve.run(None, None, lambda: None)
    assert found == [(asked, hard)]


def test_a_run_that_is_deleted_while_it_is_looked_at(run_folder):
    with serving(make_app(tiny_explorer(), Access())) as url:
        assert post(url, "/api/features", {"text": "wait"}).status_code == 200
        shutil.rmtree(only(run_folder, "runs/evaluate/*"))
        for answer in (
            http.get(f"{url}/feature/{HOOK}/1"),
            http.get(f"{url}/api/find"),
            post(url, "/api/features", {"text": "wait"}),
            post(url, "/api/steer", {"prompt": "wait"}),
            post(url, "/v1/completions", {"prompt": "wait"}),
        ):
            assert "was deleted" in refused(answer, 410)
        assert http.get(f"{url}/api/saes").json()["saes"] == []
        assert http.get(url).status_code == 200


def test_too_little_memory_to_read_files_is_said(run_folder, monkeypatch):
    def listed(_self):
        raise MemoryError

    monkeypatch.setattr(Explorer, "listed", listed)
    with serving(make_app(tiny_explorer(), Access())) as url:
        assert "out of memory; ask again when" in refused(http.get(f"{url}/api/saes"), 400)


def test_a_model_that_cannot_be_loaded_is_said_to_who_asks_it(run_folder):
    explorer = tiny_explorer()

    def broken():
        raise UserError("model.name: 'assets/tiny-llama': its weights cannot be loaded: no such file")

    explorer.load = broken
    with serving(make_app(explorer, Access())) as url:
        assert "cannot be loaded" in refused(post(url, "/api/features", {"text": "wait"}), 400)
        assert http.get(f"{url}/feature/{HOOK}/1").status_code == 200
        (sae,) = http.get(f"{url}/api/saes").json()["saes"]
        assert not sae["text"] and "cannot be loaded" in sae["why_no_text"]


def test_ingested_rows_have_pages_but_read_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(40, 16, 8)).astype(np.float32))
    small = ("ingest.shard_rows=64", "ingest.chunk_rows=32", "ingest.holdout_fraction=0.2", "train.batch_size=64")
    settings = ("ingest.path=x.npy", *small, "train.pool_rows=128", "train.sae.expansion_factor=4", *CPU)
    ingest = ROOT / "configs" / "ingest.yaml"
    ran = pipeline("run", *settings, config=ingest)
    assert ran.status == 0, ran.out
    explorer = tiny_explorer(*settings, config=ingest)
    with pytest.raises(UserError, match="ingested without a model, so there is none to read or write text"):
        explorer.load()
    with serving(make_app(explorer, Access())) as url:
        listed = http.get(f"{url}/api/saes").json()
        (sae,) = listed["saes"]
        assert (sae["text"], sae["sources"], sae["model"], listed["chat"]) == (False, [], None, False)
        assert "ingested" in sae["why_no_text"]
        assert http.get(f"{url}/feature/{sae['id']}/3").status_code == 200
        assert http.get(f"{url}/api/find").json()["total"] == 32
        assert http.get(f"{url}/api/feature/{sae['id']}/3").status_code == 200
        for path, body in (
            ("/api/features", {"text": "a"}),
            ("/api/steer", {"prompt": "a"}),
            ("/api/find", {"yes": ["a"]}),
        ):
            assert "ingested" in refused(post(url, path, body), 400)
        assert "ingested" in refused(post(url, "/v1/completions", {"prompt": "a"}), 404)
        assert http.get(f"{url}/v1/models").json()["data"] == []


def test_ctrl_c_ends_it_at_once_whatever_is_under_way(run_folder):
    port = free_port()
    process = start("explore", "--no-open", "--port", str(port), cwd=run_folder)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if post(url, "/api/features", {"text": "wait"}).status_code == 200:
                break
        time.sleep(0.1)
    with socket.create_connection(("127.0.0.1", port)), http.stream("POST", f"{url}/api/steer", json=LONG) as answer:
        texts = answer.iter_text()  # forgetting it would hang up
        assert next(texts) and process.pid
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
    assert process.exitcode == 0


def free_port() -> int:
    with contextlib.closing(serve.listening("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_port_in_use(monkeypatch):
    with contextlib.closing(serve.listening("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: {port}: in use; give another, or leave --port out"):
            serve.listening("127.0.0.1", port)
        monkeypatch.setattr(serve, "FIRST_PORT", port)
        with contextlib.closing(serve.listening("127.0.0.1", None)) as other:
            assert port < other.getsockname()[1] < port + serve.PORTS
        monkeypatch.setattr(serve, "PORTS", 1)
        with contextlib.closing(serve.listening("127.0.0.1", None)) as other:
            assert other.getsockname()[1] != port


def test_a_machine_without_a_free_port(monkeypatch):
    class Taken(socket.socket):
        def bind(self, _address):
            raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(serve.socket, "socket", Taken)
    with pytest.raises(UserError, match=r"^--host: 127\.0\.0\.1: no port is free there$"):
        serve.listening("127.0.0.1", None)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.name.invalid", "a" * 300, "two words"])
def test_a_host_that_is_not_this_machine(host):
    with pytest.raises(UserError, match="--host: "):
        serve.listening(host, 0)


def test_only_a_loopback_address_needs_no_token():
    for host, has_token, name in (
        ("127.0.0.1", False, "127.0.0.1"),
        ("localhost", False, "localhost"),
        ("0.0.0.0", True, ""),
    ):
        with contextlib.closing(serve.listening(host, 0)) as sock:
            access, port = serve.access_of(host, sock), sock.getsockname()[1]
            assert (access.token is not None) == access.addresses == has_token
            shown = serve.address(host, sock, access.token)
            assert shown.startswith(f"http://{name or socket.gethostname()}:{port}/")
            assert ("token=" in shown) == has_token
            assert not has_token or len(access.token) >= 32
            assert access.cookie == f"explore-{port}"


def test_a_browser_is_opened_where_it_is_seen(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not serve.has_desktop()
    monkeypatch.setenv("DISPLAY", ":0")
    assert serve.has_desktop()
    monkeypatch.setenv("SSH_CONNECTION", "1")
    assert not serve.has_desktop()


def test_without_a_finished_run_the_command_says_what_makes_one(fresh_folder):
    ran = pipeline("explore", "--no-open", "--port", "0")
    assert ran.status == 1
    assert "run `make all`" in ran.out
