"""Hostile bodies and text in the explorer: refused in one sentence, or given back as text."""

import json
import re
import time
from urllib.parse import quote

import explorer_server
import pytest
from explorer_server import http, post, refused, serving, stand_in
from hostile import TOKENS

from pipeline.explore.requests import CHARACTERS, DEPTH

SCRIPT = "</script><script>window.broken=1</script>"
HOOK = '"><img src=x onerror="window.broken=1">../../etc'


@pytest.fixture(scope="module")
def url(finished):
    with serving(stand_in(finished, hook=HOOK)) as found:
        yield found


@pytest.mark.parametrize(
    "name", ["..", "../..", "/etc/passwd", "runs/evaluate", "model.layers.1/..", SCRIPT, "\x00", ""]
)
def test_no_sae_is_a_path(url, name):
    refused(post(url, "/api/features", {"text": "a", "sae": name}), 404)
    refused(post(url, "/api/steer", {"prompt": "a", "sae": name}), 404)
    refused(post(url, "/v1/completions", {"prompt": "a", "model": f"tiny-llama@{name or '..'}"}), 404)
    if name:
        refused(http.get(f"{url}/api/find", params={"sae": name}), 404)


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "two values": b"{}{}",
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "cut UTF-8": '{"text": "é"}'.encode()[:-3],
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"text":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and never closed": b"[" * 900_000,
    "a string that never ends": b'{"text": "' + b'\\"' * 500_000,
    "quotes of no string": b'"\\' * 500_000,
    "a number of a million digits": b'{"text": ' + b"9" * 1_000_000 + b"}",
    "a huge exponent": b'{"text": 1e999999}',
    "NaN": b'{"text": NaN}',
    "infinity": b'{"text": -Infinity}',
    "a list": b'["text"]',
    "a number": b"1",
    "null": b"null",
    "text that is no text": b'{"text": 1}',
    "text that is a list": b'{"text": ["a"]}',
    "null text": b'{"text": null}',
    "half a character": b'{"text": "\\ud800"}',
    "two halves the wrong way round": b'{"text": "\\udc00\\ud800"}',
    "no text": b"{}",
    "a field more": b'{"text": "a", "path": "/etc/passwd"}',
    "a field of Python's": b'{"text": "a", "__class__": "x"}',
    "chat that is no truth": b'{"text": "a", "chat": "yes"}',
    "too long a text": b'{"text": "' + b"a" * (CHARACTERS + 1) + b'"}',
    "too many fields": json.dumps({"text": "a"} | {f"f{n}": n for n in range(50_000)}).encode(),
}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/steer", {"prompt": "a", "operations": [{"feature": "x", "op": "add"}]}, "operations.0.feature: 'x': "),
        ("/api/steer", {"messages": [{"role": "user", "content": 1}]}, "messages.0.content: 1: "),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt.1: 1: "),
    ],
)
def test_the_place_of_what_is_wrong_is_said(url, path, body, said):
    assert refused(post(url, path, body), 400).startswith(said)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_wrong_is_refused(url, name):
    began = time.monotonic()
    sentence = refused(post(url, "/api/features", BODIES[name]), 400)
    assert len(sentence) < 500
    assert time.monotonic() - began < 5  # none takes more time than its length


def test_depth_is_counted_outside_of_strings(url):
    brackets = "[{" * 5000 + '\\"'
    answer = post(url, "/api/features", f'{{"text": "{brackets}"}}'.encode())
    assert answer.status_code == 200
    assert len(answer.json()["tokens"]) == 10_001
    nested = b'{"text": ' + b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1) + b"}"
    assert "nested" not in refused(post(url, "/api/features", nested), 400)
    deeper = b'{"text": ' + b"[" * DEPTH + b"]" * DEPTH + b"}"
    assert "nested" in refused(post(url, "/api/features", deeper), 400)


STEERING = [
    {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
    {},
    {"messages": []},
    {"messages": [{"role": "root", "content": "a"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": "a"}] * 1000},
    {"prompt": "a", "operations": [{"feature": -1}]},
    {"prompt": "a", "operations": [{"feature": 12}]},
    {"prompt": "a", "operations": [{"feature": 1 << 70}]},
    {"prompt": "a", "operations": [{"feature": "1; rm -rf /"}]},
    {"prompt": "a", "operations": [{"feature": 1.5}]},
    {"prompt": "a", "operations": [{"feature": 1}, {"feature": 1}]},
    {"prompt": "a", "operations": [{"feature": n} for n in range(100)]},
    {"prompt": "a", "operations": [{"feature": 1, "op": "exec"}]},
    {"prompt": "a", "operations": [{"feature": 1, "where": "../.."}]},
    {"prompt": "a", "operations": [{"feature": 1, "strength": 1e300}]},
    {"prompt": "a", "operations": [{"feature": 1, "strength": "1"}]},
    {"prompt": "a", "operations": [{"feature": 1, "hook": "os.system"}]},
    {"prompt": "a", "max_new_tokens": 0},
    {"prompt": "a", "max_new_tokens": 10**9},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "temperature": 1e9},
    {"prompt": "a", "top_p": 0},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "seed": 1 << 64},
    {"prompt": "a", "shade": -1},
    {"prompt": "a", "shade": "all"},
    {"prompt": "\ud800"},
]


@pytest.mark.parametrize("body", STEERING, ids=lambda body: json.dumps(body)[:60])
def test_steering_that_makes_no_sense_is_refused(url, body):
    refused(post(url, "/api/steer", body), 400)


QUERIES = [
    {"limit": 10**9},
    {"limit": 0},
    {"limit": "all"},
    {"offset": -1},
    {"min_density": "nan"},
    {"max_density": "inf"},
    {"min_score": "1e999"},
    {"sort": "__class__"},
    {"sort": SCRIPT},
    {"order": "DROP TABLE"},
    {"source": "../../etc"},
    {"verdict": "'; --"},
    {"file": "/etc/passwd"},
    {"q": "a" * 1000},
]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_a_query_that_makes_no_sense_is_refused(url, query):
    refused(http.get(f"{url}/api/find", params=query), 400)


OPENAI = [
    ("/v1/completions", {"prompt": [10**9]}),
    ("/v1/completions", {"prompt": [-1]}),
    ("/v1/completions", {"prompt": [99_999]}),
    ("/v1/completions", {"prompt": [["a"]]}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": [[]]}),
    ("/v1/completions", {"prompt": ["a"] * 1000}),
    ("/v1/completions", {"prompt": "a", "n": 1000}),
    ("/v1/completions", {"prompt": ["a"] * 100, "n": 100}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}),
    ("/v1/completions", {"prompt": "a", "logprobs": 1000}),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 1000}),
    ("/v1/completions", {"prompt": "a", "stop": ""}),
    ("/v1/completions", {"prompt": "a", "model": "tiny-llama+1:exec"}),
    ("/v1/completions", {"prompt": "a", "model": "tiny-llama+" + "9" * 150}),
    ("/v1/completions", {"prompt": "a", "model": "tiny-llama+1:nan"}),
    ("/v1/completions", {"prompt": "a", "model": "tiny-llama+1:1e300"}),
    ("/v1/completions", {"prompt": "a", "model": "tiny-llama+1" + "+2" * 90}),
    ("/v1/completions", {"prompt": "a", "tools": [{"type": "function"}]}),
    ("/v1/chat/completions", {"messages": "a"}),
    ("/v1/chat/completions", {"messages": [["a"]]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}),
    ("/v1/chat/completions", [1]),
]


@pytest.mark.parametrize(("path", "body"), OPENAI, ids=lambda each: json.dumps(each)[:60])
def test_an_openai_request_that_makes_no_sense_is_refused(url, path, body):
    answer = post(url, path, body)
    refused(answer, 400)
    assert answer.json()["error"]["type"] == "invalid_request_error"


TEXTS = [SCRIPT, *TOKENS, "${7*7}", "{{7*7}}", "%00%0a", "data: evil\n\nevent: x", "\r\nSet-Cookie: a=b\r\n\r\n<b>"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_text_comes_back_as_text(url, text):
    answer = post(url, "/api/features", {"text": text})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "".join(token["text"] for token in answer.json()["tokens"]) == text
    assert "set-cookie" not in answer.headers


def test_what_is_refused_is_quoted_in_json_alone(url):
    for answer in (
        post(url, "/api/features", {SCRIPT: 1, "text": "a"}),
        http.get(f"{url}/api/find", params={"sort": SCRIPT}),
        http.get(f"{url}/feature/{quote(SCRIPT, safe='')}/1"),
    ):
        assert refused(answer, 400, 404)
        assert "html" not in answer.headers["content-type"]


@pytest.mark.parametrize("number", range(12))
def test_pages_escape_tokens_labels_sources_and_hooks(url, number):
    """Every token, label, sentence and source of these features is text that tries to break the page."""
    page = http.get(f"{url}/feature/one/{number}")
    assert page.status_code == 200
    assert "window.broken" in page.text
    assert not re.search(r"<(script|img|b)[ >][^<]*(broken|x onerror)|<[^>]* on\w+=", page.text)
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]


def test_a_hook_is_text_wherever_it_is_said(url):
    listed = http.get(f"{url}/api/saes")
    assert listed.json()["saes"][0]["hook"] == HOOK
    assert HOOK not in http.get(f"{url}/feature/one/1").text
    assert HOOK not in http.get(url).text


def test_an_error_of_its_own_says_nothing_of_itself(finished, capfd, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(explorer_server.StandInReader, "read", broken)
    with serving(stand_in(finished)) as url:
        sentence = refused(post(url, "/api/features", {"text": "a"}), 500)
    assert "secret" not in sentence
    assert "secret" in capfd.readouterr().err
