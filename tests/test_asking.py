"""Questions to an endpoint on loopback: side by side, each once, whatever goes wrong."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback

import pytest
from oracle_server import MODEL, Said, Server, serving

from evaluate import asking
from evaluate.asking import Answer, Endpoint, Question, ask, check_endpoint
from evaluate.endpoint import send
from harvest.files import UserError

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.05)


def endpoint(server: Server, **changed) -> Endpoint:
    return Endpoint(server.url, MODEL, None, timeout_s=5.0, tries=8, parallel=8)._replace(**changed)


def questions(count: int) -> list[Question]:
    return [Question((("system", "Count."), ("user", f"number {i}")), max_tokens=9, seed=i % 2) for i in range(count)]


def echo(messages) -> str:
    return f"{messages[-1]['content']} of {messages[0]['content']}"


def expected(count: int) -> list[Answer]:
    return [Answer(f"number {i} of Count.", "", 3, 4) for i in range(count)]


def lines(journal) -> list[str]:
    return sorted(journal.read_text().splitlines())


def refused(endpoint: Endpoint) -> str:
    with pytest.raises(UserError) as error:
        check_endpoint(endpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_answers_come_in_order_side_by_side_and_once(tmp_path):
    with serving(echo) as server:
        server.delay_s = 0.02
        asked = [*questions(20), questions(20)[3]]
        assert ask(endpoint(server), asked, tmp_path / "calls.jsonl") == [*expected(20), expected(20)[3]]
        assert sum(server.answered.values()) == len(server.answered) == 20
        assert 2 <= server.most_under_way <= 8
        assert ask(endpoint(server), questions(22), tmp_path / "calls.jsonl") == expected(22)
        assert sum(server.answered.values()) == 22
        headers, body = server.requests[0]
    assert "Authorization" not in headers
    assert body == {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": body["messages"][1]["content"]},
        ],
        "stream": False,
        "max_tokens": 9,
        "temperature": 0.0,
        "seed": int(body["messages"][1]["content"].split()[1]) % 2,
    }


@pytest.mark.parametrize(
    "changed",
    [{"model": "other"}, {"max_tokens": 10}, {"temperature": 0.5}, {"seed": 1}, {"messages": (("system", "x"),)}],
)
def test_whatever_decides_the_answer_is_another_question(tmp_path, changed):
    asked, journal = Question((("user", "x"),), 9), tmp_path / "calls.jsonl"
    with serving(lambda _: "yes") as server:
        server.models.append("other")
        ask(endpoint(server), [asked], journal)
        model = changed.pop("model", MODEL)
        ask(endpoint(server, model=model), [asked._replace(**changed)], journal)
        assert sum(server.answered.values()) == 2


def test_a_third_of_the_calls_may_fail(tmp_path):
    with serving(echo) as server:
        ask(endpoint(server), questions(100), tmp_path / "well.jsonl")
        server.answered.clear()
        server.failing, server.late_s = 0.3, 2.0
        assert ask(endpoint(server, timeout_s=1.5, tries=12), questions(100), tmp_path / "ill.jsonl") == expected(100)
        assert set(server.answered.values()) == {1} and len(server.answered) == 100
        assert len(server.requests) > 230
    assert lines(tmp_path / "ill.jsonl") == lines(tmp_path / "well.jsonl")


@pytest.mark.parametrize("answers", [1, 7, 23])
def test_an_interrupt_loses_nothing_and_asks_nothing_twice(tmp_path, answers):
    journal, sent = tmp_path / "calls.jsonl", threading.Event()

    def interrupted(messages) -> str:
        if len(server.answered) >= answers and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGINT)
        if sent.is_set():
            time.sleep(0.5)  # calls under way, which the main thread waits for
        return echo(messages)

    with serving(interrupted) as server:
        with pytest.raises(KeyboardInterrupt):
            ask(endpoint(server), questions(40), journal)
        assert answers <= len(journal.read_text().splitlines()) == len(server.answered) < 40
        server.answer = echo
        assert ask(endpoint(server), questions(40), journal) == expected(40)
        assert set(server.answered.values()) == {1} and len(server.answered) == 40
    assert len(lines(journal)) == 40


@pytest.mark.parametrize("answers", [0, 5, 30])
def test_after_a_kill_only_calls_under_way_are_made_again(tmp_path, answers):
    journal, parallel, killed = tmp_path / "calls.jsonl", 4, threading.Event()

    def held(messages) -> str:
        if len(server.answered) >= answers:
            killed.wait(20)
        return echo(messages)

    with serving(held) as server:
        child = multiprocessing.get_context("fork").Process(
            target=ask, args=(endpoint(server, parallel=parallel), questions(40), journal)
        )
        child.start()
        until = time.monotonic() + 20
        while len(server.answered) < answers or server.under_way < parallel:
            assert time.monotonic() < until
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed.set()
        while server.under_way:
            time.sleep(0.001)
        before = journal.read_bytes()
        answered, kept = len(server.answered), before.count(b"\n")
        assert answers <= kept <= answered - parallel < 40 - parallel
        assert ask(endpoint(server, parallel=parallel), questions(40), journal) == expected(40)
        twice = [count for count in server.answered.values() if count > 1]
        assert twice == [2] * (answered - kept) and len(server.answered) == 40
    assert journal.read_bytes().startswith(before)
    assert len(lines(journal)) == 40


def test_a_torn_last_line_is_asked_again_and_other_damage_is_said(tmp_path):
    journal = tmp_path / "calls.jsonl"
    with serving(echo) as server:
        ask(endpoint(server, parallel=1), questions(5), journal)
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-20])
        assert ask(endpoint(server), questions(5), journal) == expected(5)
        assert journal.read_bytes() == whole and sum(server.answered.values()) == 6
        for damage in ("{]", '{"text": "no key"}', '{"key": "a", "texts": ""}', "[]"):
            journal.write_text(f"{whole.decode()}{damage}\n")
            with pytest.raises(UserError, match=r"calls\.jsonl: line 6 is damaged"):
                ask(endpoint(server), questions(5), journal)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (Said("I will not", "content_filter"), Answer("", "refused", 1, 3)),
        (Said(None, refusal="no, thank you"), Answer("", "refused", 1, 0)),
        (Said("half an ans", "length"), Answer("half an ans", "cut off after 3 tokens", 1, 3)),
        (Said(None, "length"), Answer("", "cut off", 1, 0)),
        (Said("<think>so so</think> \n yes "), Answer("yes", "", 1, 3)),
        (Said("a \ud800 b"), Answer("a � b", "", 1, 3)),
    ],
)
def test_what_came_is_kept_be_it_a_refusal_or_half(tmp_path, said, answer):
    with serving(lambda _: said) as server:
        for _ in range(2):
            assert ask(endpoint(server), [Question((("user", "x"),), 9)], tmp_path / "calls.jsonl") == [answer]
        assert sum(server.answered.values()) == 1


def test_no_text_is_asked_for_again_and_given_up_with_a_problem(tmp_path):
    texts = [None, "", "  ", "yes"]
    with serving(lambda _: Said(texts.pop(0))) as server:
        one = [Question((("user", "x"),), 9)]
        assert ask(endpoint(server, tries=2), one, tmp_path / "calls.jsonl") == [
            Answer("", "no answer in 2 tries, at last: no text")
        ]
        assert (tmp_path / "calls.jsonl").read_bytes() == b""
        assert ask(endpoint(server, tries=2), one, tmp_path / "calls.jsonl")[0].text == "yes"


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (400, "HTTP 400: as the test says"),
        (403, "refused, HTTP 403: as the test says"),
        (429, "no answer in 3 tries, at last: HTTP 429: as the test says"),
        (503, "no answer in 3 tries, at last: HTTP 503: as the test says"),
    ],
)
def test_a_question_without_an_answer_has_a_problem(tmp_path, status, problem):
    with serving(echo) as server:
        server.status = status
        assert ask(endpoint(server, tries=3), questions(2), tmp_path / "calls.jsonl") == [Answer("", problem)] * 2
        assert len(server.requests) == (6 if status in (429, 503) else 2)
        server.status = None
        assert ask(endpoint(server), questions(2), tmp_path / "calls.jsonl") == expected(2)


@pytest.mark.parametrize("after", ["7", "Fri, 27 Nov 2026 10:00:07 GMT", "soon", "-1"])
def test_the_wait_between_tries_doubles_unless_the_server_says_when(monkeypatch, after):
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 60.0)
    monkeypatch.setattr("evaluate.endpoint.time.time", lambda: 1795773600.0)  # 10:00:00
    with serving(echo) as server:
        server.status, server.headers = 429, {"Retry_After": after}
        reply = send(endpoint(server), "/models")
    pauses = [asking._pause("a", attempt, reply) for attempt in range(9)]
    if after == "soon":
        assert all(2**i / 2 <= pause <= 2**i for i, pause in enumerate(pauses[:6])) and max(pauses) <= 60
        assert pauses == [asking._pause("a", attempt, reply) for attempt in range(9)]
        assert pauses[0] != asking._pause("b", 0, reply)
    else:
        assert pauses == [0.0 if after == "-1" else 7.0] * 9


@pytest.mark.parametrize("status", [401, 402, 404])
def test_an_endpoint_that_answers_nobody_ends_it_at_once_and_keeps_the_answers(tmp_path, status):
    journal = tmp_path / "calls.jsonl"
    with serving(echo) as server:
        ask(endpoint(server), questions(3), journal)
        server.status = status
        with pytest.raises(UserError, match=f"HTTP {status}"):
            ask(endpoint(server, parallel=2), questions(50), journal)
        assert len(server.requests) <= 3 + 2 + 1  # the list of models is no POST
    assert len(lines(journal)) == 3


def test_an_endpoint_that_went_away_ends_it(tmp_path):
    with serving(echo) as server:
        server.status = 500
        with pytest.raises(UserError, match=r"base_url: http.*: 10 questions in a row got no answer in 2 tries"):
            ask(endpoint(server, tries=2, parallel=1), questions(50), tmp_path / "calls.jsonl")
        assert len(server.requests) <= 22


def test_a_good_endpoint_passes_though_its_first_calls_fail():
    with serving(echo) as server:
        server.failing, server.late_s = 0.3, 2.0
        for _ in range(10):
            check_endpoint(endpoint(server, timeout_s=1.5, tries=12))
        assert server.probes == 10 and not server.answered


def test_nobody_there_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = taken.getsockname()[1]
        said = refused(Endpoint(f"http://127.0.0.1:{port}", MODEL, None, 1.0, 5, 1))
    assert said == (
        f"explain.runtime.base_url: http://127.0.0.1:{port}/v1: does not answer (Connection refused); start the "
        "server, or give another address"
    )


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "file:///etc/passwd", "http://", "http://a:b/v1", "http://a b/", ""]
)
def test_what_is_no_address_is_said(url):
    assert "no address; it looks like http://localhost:8000/v1" in refused(Endpoint(url, MODEL, None, 1.0, 5, 1))


def test_a_key_is_wanted_taken_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_everybody")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    with serving(echo) as server:
        server.key = "sk-right"
        assert refused(endpoint(server)) == (
            f"explain.runtime.api_key_env: {server.url} wants a key (HTTP 401: Incorrect API key provided: None); name "
            "an environment variable that holds one"
        )
        wrong = endpoint(server, api_key=KEY)
        said = refused(wrong)
        assert "does not take the key" in said and "(the key)" in said and KEY not in said
        with pytest.raises(UserError) as error:
            ask(wrong, questions(1), tmp_path / "calls.jsonl")
        shown = "".join(traceback.format_exception(error.value)) + repr(wrong) + str(wrong) + f"{wrong}"
        assert KEY not in shown
        right = endpoint(server, api_key="sk-right")
        check_endpoint(right)
        assert ask(right, questions(1), tmp_path / "calls.jsonl") == expected(1)
        assert "sk-right" not in (tmp_path / "calls.jsonl").read_text()
        for odd in ("sk-\n", "sk-é"):
            assert "holds characters that no key has" in refused(endpoint(server, api_key=odd)) and odd not in said
    assert "user name or password" in refused(Endpoint("http://me:pw@host/v1", MODEL, None, 1.0, 5, 1))


def test_no_such_model_names_those_that_there_are():
    with serving(echo) as server:
        assert "explain.model: 'gpt': " in (said := refused(endpoint(server, model="gpt")))
        assert said.endswith("has no such model; it has oracle")
        server.models += [f"m{i}\x1b[31m" for i in range(9)]
        assert refused(endpoint(server, model="gpt")).endswith(
            "it has oracle, " + ", ".join(f"m{i}\\x1b[31m" for i in range(7)) + " and 2 more"
        )


def test_a_slow_one_is_said_after_two_tries():
    with serving(echo) as server:
        server.failing, server.late_s = 1.0, 1.5
        server.random.choice = lambda _: "late"
        assert refused(endpoint(server, timeout_s=0.5)).startswith("explain.runtime.timeout_s: 0.5: ")
        assert len(server.requests) == 2


def test_a_server_that_sends_a_byte_now_and_then_is_slow_too():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):  # the client leaves
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.02)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert send(Endpoint(url, MODEL, None, 0.3, 1, 1), "/models").timed_out


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html>\n<b>\x1b[31mHello", b"[]", b'{"choices": []}', b"\xff\xfe", b"[" * 99999]
)
def test_what_speaks_no_openai_is_said(page):
    with serving(echo) as server:
        server.page = page
        said = refused(endpoint(server, tries=2))
        assert "does not speak the OpenAI protocol (HTTP 200: " in said and "most addresses end in /v1" in said
        assert said.isprintable() and len(said) < 500
        server.page = None
        assert "HTTP 404" in refused(endpoint(server, base_url=server.url.removesuffix("v1") + "v2"))


def test_a_redirect_is_not_followed_as_the_key_would_go_along():
    with serving(echo) as server, serving(echo) as other:
        server.status, server.headers = 307, {"Location": other.url}
        assert refused(endpoint(server, api_key=KEY)).endswith(f"leads on to '{other.url}'; give that address")
        assert not other.requests


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_end_as_people_write_it(tail):
    with serving(echo) as server:
        check_endpoint(endpoint(server, base_url=server.url.removesuffix("/v1") + tail))


def test_this_machine_is_reached_though_a_proxy_is_set(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(echo) as server:
        check_endpoint(endpoint(server))
        check_endpoint(endpoint(server, base_url=server.url.replace("127.0.0.1", "localhost")))
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        assert refused(
            endpoint(server, base_url="http://elsewhere.invalid/v1", tries=1)
        )  # through the proxy, as others
        assert server.requests[-1][0]["Host"] == "elsewhere.invalid"


def test_progress_counts_what_the_journal_had(tmp_path):
    class Counting:
        done = 0

        def advance(self, amount: int) -> None:
            self.done += amount

    with serving(echo) as server:
        for count in (7, 12):
            progress = Counting()
            ask(endpoint(server), questions(count), tmp_path / "calls.jsonl", progress)
            assert progress.done == count
    assert all(set(json.loads(line)) == {"key", *Answer._fields} for line in lines(tmp_path / "calls.jsonl"))
