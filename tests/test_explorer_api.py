"""The explorer's own endpoints, spoken over a socket, on the finished tiny run."""

import contextlib
import json
import os
import re
import shlex
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from conftest import pipeline
from explorer_server import HOOK, events, http, port_of, post, refused, serving, tiny_explorer
from safetensors.numpy import load as load_arrays

from evaluate.activity import LEFT_OUT
from evaluate.token_injection import NAMES as VERDICTS
from harvest.files import read_json
from pipeline.explore import safety
from pipeline.explore.app import make_app
from pipeline.explore.cards import card
from pipeline.explore.features import FindQuery
from pipeline.explore.openapi import OPERATIONS
from pipeline.explore.safety import Access
from pipeline.explore.writing import Written

TEXT = "wait therefore the sum of two numbers 🙂 <think>"
LONG = {"prompt": "wait", "max_new_tokens": 100, "temperature": 1, "seed": 1}


@pytest.fixture(scope="module")
def explorer(finished):
    before = Path.cwd()
    os.chdir(finished)
    yield tiny_explorer()
    os.chdir(before)


@pytest.fixture(scope="module")
def url(explorer):
    with serving(make_app(explorer, Access())) as found:
        yield found


@pytest.fixture(scope="module")
def shelf(explorer):
    return explorer.shelf(None)


def strongest(shelf) -> int:
    return int(shelf.activity["max"].max(0).argmax())


def test_it_says_what_can_be_looked_at(url, shelf):
    assert http.get(f"{url}/api/saes").json() == {
        "saes": [
            {
                "id": HOOK,
                "title": HOOK,
                "hook": HOOK,
                "kind": "standard",
                "d_in": 32,
                "d_sae": 128,
                "model": "tiny-llama",
                "sources": ["chat", "reasoning"],
                "has": {"score": True, "injection": True, "labels": False},
                "text": True,
                "why_no_text": "",
            }
        ],
        "limits": {"text_tokens": 128, "new_tokens": 4096, "operations": 16},
        "chat": True,
        "thinking": True,
    }


def test_the_page_offers_every_verdict(url):
    page = http.get(url).text
    assert all(f">{verdict}<" in page for verdict in VERDICTS)


def test_the_features_of_a_text_are_those_that_the_reader_finds(url, explorer, shelf):
    read = explorer.load().read(shelf, TEXT)
    found = post(url, "/api/features", {"text": TEXT}).json()
    assert found["sae"] == HOOK and found["cut"] is None and found["ms"] > 0
    assert [token["id"] for token in found["tokens"]] == read.ids
    assert [token["text"] for token in found["tokens"]] == read.texts
    assert [token["counts"] for token in found["tokens"]] == read.kept_S.tolist()
    assert found["active"]["indptr"] == read.indptr_S1.tolist()
    assert found["active"]["feature"] == read.feature_N.tolist()
    assert found["active"]["value"] == [round(float(value), 6) for value in read.value_N]
    first = found["features"][0]
    kept = np.repeat(read.kept_S, np.diff(read.indptr_S1))
    assert first["max"] == read.value_N[kept].max() == max(line["max"] for line in found["features"])
    assert first["density"] == shelf.table.density_F[first["feature"]]


def test_arrays_are_the_same(url):
    asked = {"sae": HOOK, "text": TEXT}
    arrays = load_arrays(post(url, "/api/features", asked, accept="application/octet-stream").content)
    found = post(url, "/api/features", asked).json()
    assert arrays["ids"].tolist() == [token["id"] for token in found["tokens"]]
    assert arrays["kept"].tolist() == [token["counts"] for token in found["tokens"]]
    for name in ("indptr", "feature"):
        assert arrays[name].tolist() == found["active"][name]
    assert arrays["value"].dtype == np.float32
    np.testing.assert_allclose(arrays["value"], found["active"]["value"], atol=1e-6)


def test_a_long_text_is_cut_and_that_is_said(url):
    found = post(url, "/api/features", {"text": "wait " * 300}).json()
    assert found["cut"]["kept"] == len(found["tokens"]) == 128
    assert found["cut"]["tokens"] > 300


def test_a_text_as_a_turn_has_the_template_around_it(url):
    plain, turn = (
        post(url, "/api/features", {"text": "wait", "chat": chat}).json()["tokens"] for chat in (False, True)
    )
    texts = [token["text"] for token in turn]
    assert texts[0] == "<|im_start|>" and len(turn) > len(plain)


@pytest.mark.parametrize("text", ["", "\u0000"])
def test_a_text_of_nothing_is_a_sentence(url, text):
    answer = post(url, "/api/features", {"text": text})
    if not text:
        assert "empty" in refused(answer, 400)
    else:
        assert answer.status_code == 200


def test_finding(url, shelf):
    asked = {"sae": HOOK, "token": "wait", "sort": "density", "order": "asc", "limit": 3, "offset": 1, "min_score": ""}
    found = http.get(f"{url}/api/find", params=asked).json()
    expected = shelf.table.find(FindQuery(token="wait", sort="density", order="asc", limit=3, offset=1))
    assert found == {"total": expected.total, "features": expected.features}
    assert found["total"] > 4
    assert http.get(f"{url}/api/find").json()["total"] == 128


def test_finding_by_example(url, explorer, shelf):
    body = {"yes": ["wait therefore", "therefore wait"], "no": ["numbers"], "limit": 4}
    found = post(url, "/api/find", body).json()["features"]
    reader = explorer.load()
    reads = [reader.read(shelf, text, within=True) for text in (*body["yes"], *body["no"])]

    def fired(read, feature):
        kept = np.repeat(read.kept_S, np.diff(read.indptr_S1)) & (read.feature_N == feature)
        return float(read.value_N[kept].max(initial=0))

    assert 0 < len(found) <= 4
    for line in found:
        peaks = [fired(read, line["number"]) for read in reads]
        assert (line["yes"], line["no"]) == (max(peaks[:2]), peaks[2])
        assert {name: line[name] for name in shelf.table.row(0)} == shelf.table.row(line["number"])
    assert found[0]["yes_texts"] == 2


def test_a_card(url, shelf):
    number = strongest(shelf)
    found = http.get(f"{url}/api/feature/{HOOK}/{number}").json()
    assert {name: found[name] for name in shelf.table.row(number)} == shelf.table.row(number)
    assert found["promoted"] == [each["text"] for each in shelf.view(number)["promoted"]]
    assert len(found["excerpts"]) == 3
    assert max(token["value"] for token in found["excerpts"][0]) == pytest.approx(found["max"])
    assert "".join(token["text"] for token in found["excerpts"][0]).strip()


def test_a_row_that_does_not_count_has_no_activation_on_a_card(shelf):
    def excerpts(kind, feature):
        found = shelf.activity.excerpts(kind, feature)
        return found._replace(acts_NT=np.where(np.arange(found.acts_NT.shape[1]) == 0, LEFT_OUT, found.acts_NT))

    marked = SimpleNamespace(view=shelf.view, table=shelf.table, text=shelf.text, activity=SimpleNamespace())
    marked.activity.excerpts = excerpts
    found = card(marked, strongest(shelf))["excerpts"]
    assert [context[0]["value"] for context in found] == [0, 0, 0]


def test_pages_of_any_feature(url):
    page = http.get(f"{url}/feature/{HOOK}/127")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "127" in page.text
    assert "128 features" in refused(http.get(f"{url}/feature/{HOOK}/128"), 404)


def test_files_of_the_pages_are_asked_for_once(url):
    found = http.get(f"{url}/static/explore.css")
    assert found.headers["content-type"].startswith("text/css")
    again = http.get(f"{url}/static/explore.css", headers={"if-none-match": found.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_an_answer_is_streamed_with_the_command_that_gives_the_same(url, shelf, tmp_path, monkeypatch):
    """Texts and counts are those of the command that it says, run in a shell's words."""
    one, two = np.argsort(-shelf.activity["max"].max(0))[:2].tolist()
    operations = [
        {"feature": one, "strength": 4.0, "where": "prompt"},
        {"feature": two, "op": "set", "strength": 3.0, "where": "generated"},
    ]
    prompt = '--help; let\'s "check"\n $HOME'
    asked = {
        "prompt": prompt,
        "operations": operations,
        "max_new_tokens": 8,
        "temperature": 0.7,
        "seed": 3,
        "chat": False,
    }
    found = events(post(url, "/api/steer", asked | {"shade": one}))
    assert found[-1]["done"]
    words = shlex.split(found[-1]["command"])
    assert words[:4] == [".venv/bin/python", "-m", "pipeline", "steer"]
    # The largest activations that it finds by itself may differ in the last bit, and then so may what is written.
    maxima = shelf.activity["max"].max(0)[[one, two]].tolist()
    assert [word for word in words if "max-act" in word] == [f"--max-activation={each}" for each in maxima]
    to = tmp_path / "out.json"
    ran = pipeline(*words[3:], "--json", str(to))
    assert ran.status == 0, ran.out
    for side, expected in zip(("plain", "steered"), read_json(to)["completions"][0]["completions"][0], strict=True):
        written = [each for each in found if each.get("side") == side and "text" in each]
        (end,) = (each for each in found if each.get("side") == side and "end" in each)
        assert "".join(each["text"] for each in written) == expected["text"]
        assert [each["id"] for each in written if each["id"] is not None] == expected["token_ids"]
        assert [end[name] for name in ("ended", "processed", "changed")] == [
            expected[name] for name in ("ended", "processed", "changed")
        ]
        assert end["end"] is True and any(each["value"] for each in written if each["value"] is not None)
    assert found[0]["side"] == "plain" and found[1]["side"] == "steered"  # as they are written, not one after another


def test_without_operations_there_is_one_side_and_no_command(url):
    found = events(post(url, "/api/steer", {"prompt": "wait", "max_new_tokens": 3}))
    assert {each.get("side") for each in found[:-1]} == {"plain"}
    assert found[-1] == {"done": True, "command": None}


def test_a_conversation_is_answered(url):
    turns = [
        {"role": "user", "content": "wait"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "x"},
    ]
    operations = [{"feature": 3, "op": "ablate"}]
    whole = events(post(url, "/api/steer", {"messages": turns, "operations": operations, "max_new_tokens": 3}))
    last = events(post(url, "/api/steer", {"messages": turns[2:], "operations": operations, "max_new_tokens": 3}))
    prompt = events(post(url, "/api/steer", {"prompt": "x", "operations": operations, "max_new_tokens": 3}))
    assert whole[-1]["command"] is None and last[-1]["command"]
    assert last == prompt
    processed = [next(each["processed"] for each in found if "end" in each) for found in (whole, last)]
    assert processed[0] > processed[1]


def test_what_cannot_be_written_is_said_before_the_answer_begins(url):
    assert "positions" in refused(post(url, "/api/steer", {"prompt": "wait", "max_new_tokens": 128}), 400)
    assert "empty" in refused(post(url, "/api/steer", {"prompt": " "}), 400)
    assert "128 features" in refused(post(url, "/api/steer", {"prompt": "a", "shade": 128}), 400)


def endless(closed: threading.Event, text: str = "a"):
    """Writes for ever; says when it is closed."""

    def write(_reader, _shelf, _ask):
        try:
            while True:
                time.sleep(0.01)
                yield Written(0, 5, text, None)
        finally:
            closed.set()

    return write


def test_a_client_that_hangs_up_ends_its_answer(url, monkeypatch):
    closed = threading.Event()
    monkeypatch.setattr("pipeline.explore.app.write", endless(closed))
    with http.stream("POST", f"{url}/api/steer", json=LONG) as answer:
        texts = answer.iter_text()  # forgetting it would hang up
        assert next(texts).startswith("data: ")
        assert not closed.is_set()
    assert closed.wait(5)


@pytest.mark.parametrize("stream", [False, True])
def test_and_so_for_programs(url, monkeypatch, stream):
    closed = threading.Event()
    monkeypatch.setattr("pipeline.explore.openai_answers.write", endless(closed))
    body = {"prompt": "wait", "max_tokens": 99, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        http.stream("POST", f"{url}/v1/completions", json=body, timeout=0.5) as answer,
    ):
        next(answer.iter_text())
        assert stream
    assert closed.wait(5)


def test_a_client_that_takes_nothing_ends_its_answer_too(url, monkeypatch):
    closed = threading.Event()
    monkeypatch.setattr(safety, "SEND_S", 0.3)
    monkeypatch.setattr("pipeline.explore.app.write", endless(closed, "a" * 1_000_000))
    body = json.dumps(LONG).encode()
    head = b"POST /api/steer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port_of(url))) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert closed.wait(20)


def test_a_question_does_not_wait_for_an_answer(url, monkeypatch):
    monkeypatch.setattr("pipeline.explore.app.write", endless(threading.Event()))
    with http.stream("POST", f"{url}/api/steer", json=LONG) as answer:
        next(texts := answer.iter_text())
        assert post(url, "/api/features", {"text": "wait"}).status_code == 200
        assert next(texts)  # which is still being written


def test_too_many_are_told_to_come_again(url, explorer, monkeypatch):
    monkeypatch.setattr(explorer.desk, "_waiting", 0)
    for path, body in (
        ("/api/features", {"text": "a"}),
        ("/api/steer", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        answer = post(url, path, body)
        assert "ask again in" in refused(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1


def test_the_description_names_every_endpoint_and_field(url):
    found = http.get(f"{url}/openapi.json").json()
    assert {(method, path) for method, path, *_ in OPERATIONS} == {
        (method, path) for path, methods in found["paths"].items() for method in methods
    }
    routes = {(m.lower(), re.sub(":(int|path)}", "}", r.path)) for r in explorer_routes() for m in r.methods - {"HEAD"}}
    described = {(method, path) for method, path, *_ in OPERATIONS}
    assert {each for each in routes if each[1].startswith(("/api", "/v1"))} == described
    steer = found["components"]["schemas"]["SteerAsked"]["properties"]
    assert {"prompt", "messages", "operations", "seed", "shade"} <= steer.keys()
    refs = {part.split('"')[0] for part in http.get(f"{url}/openapi.json").text.split("#/components/schemas/")[1:]}
    assert refs <= found["components"]["schemas"].keys()


def explorer_routes():
    from pipeline.explore.app import Routes
    from pipeline.explore.openai_api import Endpoints

    return [*Routes(None).listed(), *Endpoints(None).listed()]
