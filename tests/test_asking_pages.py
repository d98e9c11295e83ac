"""What comes in the place of an answer."""

from oracle_server import serving
from test_asking import echo, endpoint, questions, quick  # noqa: F401 - a fixture

from evaluate.asking import Answer, ask


def test_an_answer_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.endpoint.MAX_BYTES", 1 << 20)
    with serving(lambda _: "x" * (1 << 21)) as server:
        assert ask(endpoint(server, tries=2), questions(1), tmp_path / "calls.jsonl") == [
            Answer("", "no answer in 2 tries, at last: an answer of more than 1 MiB")
        ]


def test_a_page_in_the_place_of_an_answer_is_a_problem(tmp_path):
    with serving(echo) as server:
        server.page = b"<b>Sign in"
        found = ask(endpoint(server, tries=2), questions(1), tmp_path / "calls.jsonl")
    assert found == [Answer("", "no answer in 2 tries, at last: HTTP 200: <b>Sign in")]
