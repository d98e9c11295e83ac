"""Hostile requests to the explorer on a real port: each ends in a 4xx, or its text comes back as text."""

import contextlib
import socket
import time
from urllib.parse import quote

import httpx
import pytest
from explorer_server import http, port_of, post, refused, said, serving, stand_in, status_of

from pipeline.explore import pages, safety
from pipeline.explore.safety import Access

TOKEN = "a-token-that-nobody-guesses"
SCRIPT = "</script><script>window.broken=1</script>"
PASSWD = b"root:"


@pytest.fixture(scope="module")
def url(finished):
    with serving(stand_in(finished)) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(finished):
    """An explorer that listens for others too, and asks for a token."""
    with serving(stand_in(finished, Access(frozenset({"box.example"}), True, TOKEN, "explore-1"))) as found:
        yield found


# Names that a site's owner can make lead to 127.0.0.1, or that stand for none.
HOSTS = [
    "evil.example",
    "evil.example:7860",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil.example@127.0.0.1",
    "localhost@evil.example",
    "127.0.0.1 evil.example",
    "127.1",
    "2130706433",
    "0x7f000001",
    "10.0.0.1",
    "169.254.169.254",
    "[::2]",
    "[::1",
    "localhost:99999999",
    "localhost:",
    "localhost/",
    "localhost.",
    "loсalhost",
    "",
]


@pytest.mark.parametrize("host", HOSTS)
def test_another_host_is_refused(url, host):
    raw = said(url, b"GET /api/saes HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host.encode())
    assert status_of(raw) in (400, 421)
    assert b"model.layers" not in raw


@pytest.mark.parametrize("name", ["localhost", "LocalHost", "127.0.0.1", "127.0.0.2", "[::1]", "localhost:1"])
def test_own_names_are_answered(url, name):
    assert http.get(f"{url}/api/saes", headers={"host": name}).status_code == 200


def test_two_hosts_or_none_are_refused(url):
    for hosts in (b"Host: localhost\r\nHost: evil.example\r\n", b""):
        assert status_of(said(url, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n")) in (400, 421)
    assert status_of(said(url, b"GET / HTTP/1.0\r\n\r\n")) == 421


ORIGINS = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:1"},  # another program of this machine
    {"origin": "file://"},
    {"origin": "http://127.0.0.1.evil.example"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "CROSS-SITE"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
]


@pytest.mark.parametrize("headers", ORIGINS, ids=str)
def test_other_sites_may_not_ask(url, headers):
    """Neither for what is written nor for what is read: a GET's answer could be measured or embedded."""
    assert "may not ask" in refused(post(url, "/api/features", {"text": "a"}, **headers), 403)
    assert "may not ask" in refused(http.get(f"{url}/api/saes", headers=headers), 403)
    assert "may not ask" in refused(http.get(f"{url}/v1/models", headers=headers), 403)


def test_a_link_of_another_site_leads_to_a_page_alone(url):
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    for path, status in (("/", 200), ("/feature/one/3", 200), ("/static/explore.css", 403), ("/api/saes", 403)):
        assert http.get(url + path, headers=followed).status_code == status, path
    assert http.get(f"{url}/", headers=followed | {"sec-fetch-dest": "iframe"}).status_code == 403


def test_its_own_page_may_ask(url):
    own = {"origin": url, "sec-fetch-site": "same-origin"}
    assert post(url, "/api/features", {"text": "a"}, **own).status_code == 200
    assert post(url, "/api/features", {"text": "a"}, **own | {"origin": "null"}).status_code == 200
    assert post(url, "/api/features", {"text": "a"}).status_code == 200  # a program


def test_no_answer_lets_other_sites_read_it(url):
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = http.options(f"{url}/api/features", headers=preflight)
    refused(answer, 403)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


PATHS = [
    "/../../../../etc/passwd",
    "/static/../../../../etc/passwd",
    "/static/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/static/%2e%2e/%2e%2e/etc/passwd",
    "/static/....//....//etc/passwd",
    "/static/..%5c..%5cetc%5cpasswd",
    "/static//etc/passwd",
    "/static/%00",
    "/static/explore.css%00.html",
    "/static/%ff%fe",
    "/static/safety.py",
    "/static/../safety.py",
    "/feature/../1",
    "/feature/..%2f..%2fetc/1",
    "/feature/one/..%2f..%2fetc",
    "/feature/one/-1",
    "/feature/one/12",
    "/feature/one/99999999999999999999999999",
    "/feature/one/1e3",
    "/feature/%3Cscript%3Ealert(1)%3C%2Fscript%3E/1",
    "/api/feature/..%2f..%2fruns/1",
    "/api/feature/one/100000",
    "/api/saes/../../etc/passwd",
    "/v1/models/..%2f..%2fetc%2fpasswd",
    "/v1/models/" + quote(SCRIPT),
    "//evil.example/",
    "/.git/config",
    "/runs/",
    "/index.html",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(url, path):
    raw = said(url, b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
    assert 400 <= status_of(raw) < 500
    assert PASSWD not in raw
    assert b"content-type: application/json" in raw.lower()


def test_a_large_body_is_refused_whether_or_not_it_says_so(url):
    assert "1 MiB" in refused(post(url, "/api/features", b"a" * (safety.BODY_BYTES + 1)), 413)
    pieces = (b"a" * 65536 for _ in range(17))
    chunked = http.post(f"{url}/api/features", content=pieces, headers={"content-type": "application/json"})
    refused(chunked, 413)
    head = b"POST /api/features HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b\r\n\r\n"
    for length in (b"99999999999999999999", b"9" * 5000, b"-1", b"1, 2"):
        assert status_of(said(url, head % length)) in (400, 413)


def test_a_body_of_another_type_is_refused(url):
    """Those that a page of another site may send without asking first, and those that unpack to more."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        refused(http.post(f"{url}/api/features", content=b'{"text": "a"}', headers={"content-type": kind}), 415)
    refused(post(url, "/api/features", b"\x1f\x8b" + b"a" * 100, **{"content-encoding": "gzip"}), 415)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW"])
def test_other_methods_are_refused(url, method):
    raw = said(url, b"%b /api/saes HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % method.encode())
    assert status_of(raw) in (400, 405)


def test_a_get_of_what_is_posted_is_refused(url):
    for path in ("/api/features", "/api/steer", "/v1/completions", "/v1/chat/completions"):
        assert refused(http.get(url + path), 405) == "not with this method"
    assert refused(http.get(f"{url}/api"), 404) == "there is nothing at this address"


RAW = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a line that does not end": b"GET /" + b"a" * 70_000,
    "a long address": b"GET /?" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 100 + b"\r\n",
    "a flood of headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 12_000 + b"\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 60_000 + b"\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n\r\n",
    "a header of no name": b"GET / HTTP/1.1\r\nHost: localhost\r\n: y\r\n\r\n",
    "a split header": b"GET / HTTP/1.1\r\nHost: localhost\r\nx: a\rb\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
    "a length and chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
    b"Transfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "chunks that are none": b"POST /api/features HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "another's address": b"GET http://evil.example/api/saes HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "an address with a host": b"GET http://localhost/api/saes HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "bytes in the address": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_proper_http_is_refused(url, name):
    raw = said(url, RAW[name])
    assert 400 <= status_of(raw) < 500
    assert b"model.layers" not in raw


def test_a_websocket_is_not_begun(url):
    asked = b"GET /%b HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    keys = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    assert status_of(said(url, asked % b"api/steer" + keys, 3)) == 405
    assert b" 101 " not in said(url, asked % b"" + keys, 1)


def test_a_refusal_ends_its_connection(url):
    """What was not read of a refused body would be taken for the next request: one that nobody has checked."""
    inner = b"GET /api/saes HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"POST /api/features HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\n"
    raw = said(url, head + b"Content-Length: %d\r\n\r\n" % len(inner) + inner)
    assert status_of(raw) == 421
    assert raw.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in raw.lower()


def test_hurry_is_asked_of_slow_clients(url, monkeypatch):
    """A head or a body that comes a byte at a time ends after its time, however many bytes come."""
    monkeypatch.setattr(safety, "HEAD_S", 0.3)
    monkeypatch.setattr(safety, "BODY_S", 0.3)
    for begun in (
        b"GET / HTTP/1.1\r\nx: ",
        b"",
        b"POST /api/features HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n",
    ):
        began, found = time.monotonic(), b""
        with socket.create_connection(("127.0.0.1", port_of(url)), 10) as connection, contextlib.suppress(OSError):
            connection.settimeout(0.05)
            connection.sendall(begun)
            while time.monotonic() - began < 10:
                if begun:
                    connection.sendall(b"a")
                with contextlib.suppress(TimeoutError):
                    piece = connection.recv(65536)
                    found += piece
                    if not piece:
                        break
        assert 0.25 < time.monotonic() - began < 5
        assert not found or status_of(found) == 408


def test_a_second_head_has_no_more_time(url, monkeypatch):
    monkeypatch.setattr(safety, "HEAD_S", 0.3)
    with socket.create_connection(("127.0.0.1", port_of(url)), 10) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of(connection.recv(65536)) == 200
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 10:
                connection.sendall(b"a")
                time.sleep(0.05)
        assert 0.25 < time.monotonic() - began < 5


LARGE = 1 << 25  # bytes of an answer: more than the system takes of it for a client that reads nothing


def ask_large(connection, monkeypatch, requests):
    monkeypatch.setitem(pages.assets(), "large.js", pages.Asset(b"x" * LARGE, "text/javascript"))
    one = b"GET /static/large.js HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
    connection.sendall(one % b"" * (requests - 1) + one % b"Connection: close\r\n")


@pytest.mark.parametrize("requests", [1, 2])
def test_who_takes_nothing_of_an_answer_is_hung_up_on(url, monkeypatch, capfd, requests):
    """Where all of it is written and the connection only waits to be closed, and where another answer waits."""
    monkeypatch.setattr(safety, "SEND_S", 0.1)
    found = 0
    with socket.create_connection(("127.0.0.1", port_of(url)), 10) as connection, contextlib.suppress(OSError):
        ask_large(connection, monkeypatch, requests)
        time.sleep(1)
        while piece := connection.recv(1 << 20):
            found += len(piece)
    assert found < LARGE
    assert "Traceback" not in capfd.readouterr().err


def test_who_takes_an_answer_slowly_gets_all_of_it(url, monkeypatch):
    monkeypatch.setattr(safety, "SEND_S", 0.5)
    found = 0
    with socket.create_connection(("127.0.0.1", port_of(url)), 10) as connection:
        ask_large(connection, monkeypatch, 1)
        while piece := connection.recv(1 << 20):
            found += len(piece)
            time.sleep(0.05)
    assert found > LARGE


def test_too_many_at_once_are_told_when_to_come_again(url, monkeypatch):
    monkeypatch.setattr(safety, "AT_ONCE", 0)
    answer = http.get(f"{url}/api/saes")
    refused(answer, 429)
    assert int(answer.headers["retry-after"]) > 0


def test_every_answer_has_the_headers(url):
    for answer in (http.get(url), http.get(f"{url}/nowhere"), http.get(f"{url}/api/saes"), post(url, "/v1/x", {})):
        assert {name: answer.headers[name] for name in safety.headers()} == safety.headers()
        assert "server" not in answer.headers
    policy = safety.headers()["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy


WRONG = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": f"Bearer {TOKEN}x"},
    {"authorization": f"Bearer {TOKEN[:-1]}"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": "Bearer"},
    {"authorization": TOKEN},
    {"cookie": "explore-1=wrong"},
    {"cookie": f"explore={TOKEN}"},
    {"cookie": "explore-1="},
    {"cookie": f"explore-1\x0b={TOKEN}"},
    {"x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1"},
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_without_the_token_nothing_is_answered(guarded, headers):
    for path in ("/", "/api/saes", "/static/explore.css", "/v1/models", "/openapi.json", "/nowhere"):
        raw = b"".join(b"%b: %b\r\n" % (n.encode(), v.encode()) for n, v in headers.items())
        answer = said(
            guarded, b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b\r\n" % (path.encode(), raw)
        )
        assert status_of(answer) in (400, 401)
    assert post(guarded, "/api/features", {"text": "a"}).status_code == 401


@pytest.mark.parametrize(
    "query", ["token=", "token=wrong", f"token={TOKEN}x", f"Token={TOKEN}", f"token=x&token={TOKEN[:-1]}"]
)
def test_a_wrong_token_of_an_address_is_refused(guarded, query):
    answer = http.get(f"{guarded}/?{query}")
    refused(answer, 401)
    assert "set-cookie" not in answer.headers


def test_the_token_lets_in(guarded):
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert http.get(f"{guarded}/api/saes", headers=bearer).status_code == 200
    assert http.get(f"{guarded}/api/saes", headers=bearer | {"host": "box.example:7860"}).status_code == 200
    assert http.get(f"{guarded}/api/saes", headers=bearer | {"host": "192.168.1.7:7860"}).status_code == 200
    refused(http.get(f"{guarded}/api/saes", headers=bearer | {"host": "evil.example"}), 421)
    refused(http.get(f"{guarded}/api/saes", headers=bearer | {"origin": "https://evil.example"}), 403)


def test_cookies_of_other_ports_do_not_hide_it(guarded):
    for others in ("a@b=1; {}; c", "explore-2=x; {}", "{}; x/y=,"):
        cookies = {"cookie": others.format(f"explore-1={TOKEN}")}
        assert http.get(f"{guarded}/api/saes", headers=cookies).status_code == 200


def test_the_token_of_an_address_becomes_a_cookie(guarded):
    """So that it stays neither in the address line nor in what is sent to anybody."""
    with httpx.Client() as browser:
        answer = browser.get(f"{guarded}/?token={TOKEN}&a=b")
        assert (answer.status_code, answer.headers["location"]) == (303, "/?a=b")
        attributes = answer.headers["set-cookie"].lower()
        assert "httponly" in attributes
        assert "samesite=lax" in attributes
        assert browser.get(f"{guarded}/api/saes").status_code == 200
    for path in (b"//evil.example/", rb"/\evil.example/", rb"/\/evil.example/"):  # other hosts, to a browser
        request = b"GET %b?token=%b HTTP/1.1\r\nHost: box.example\r\nConnection: close\r\n\r\n"
        answer = said(guarded, request % (path, TOKEN.encode()))
        assert b"\r\nlocation: /evil.example/\r\n" in answer


def test_a_bearer_key_means_nothing_where_no_token_is_asked_for(url):
    assert http.get(f"{url}/v1/models", headers={"authorization": "Bearer sk-anything"}).status_code == 200
