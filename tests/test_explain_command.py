"""What `pipeline explain` refuses and asks, and how other commands see its directory."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from conftest import only, pipeline, unlisted
from oracle_server import MODEL, serving
from oracles import oracle
from planted import EVALUATED, HOOK
from test_explain import explain, folder, options, planted, run_of  # noqa: F401 - fixtures

from evaluate.loopback import is_here
from harvest.files import read_json, write_sealed
from pipeline import explain as explaining


def refused(arguments: list[str]) -> str:
    ran = pipeline(*arguments)
    assert ran.status in (1, 2), ran.out
    assert not list(Path("runs/explain").glob("*/manifest.json"))
    return " ".join(ran.out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--feature", "500"], "explain.feature_ids: 500: the SAE has 128 features, 0 to 127"),
        (["--feature", "77"], f"explain.feature_ids: 77: it fires on no held-out row ({HOOK}); take it out"),
        (["--feature", "1", "--feature", "1"], "feature_ids"),
        (["--model", "another"], "explain.model: 'another'"),
        (["evaluate.features=null"], "evaluate.features: null: explain reads what it writes"),
        (["explain.runtime.api_key_env=NO_SUCH_KEY"], "explain.runtime.api_key_env: NO_SUCH_KEY: this variable is not"),
        (["explain.runtime.api_key_env=sk-123"], "the name of an environment variable is meant"),
        (["explain.test=3"], "explain.test: unknown setting; did you mean 'tests'?"),
        (["train.lr=3e-3"], "explain: the evaluate stage for these settings is not complete"),
    ],
)
def test_what_cannot_be_is_said(folder, arguments, says):  # noqa: F811
    with serving(oracle) as server:
        assert says in refused(options(server, *arguments))
        assert not server.answered


def test_features_with_pages_that_cannot_be_explained_are_said(folder):  # noqa: F811
    path = only(folder, "runs/evaluate/*/metrics.json")
    unlisted(path.parent)
    found = read_json(path)
    with serving(oracle) as server:
        for numbers, says in (
            ([], f"explain: no feature of {HOOK} has a page; explain.feature_ids chooses some"),
            (
                [77, 78],
                "none of the 2 features of model.layers.1 can be explained: 2 are such that each fires on no held-",
            ),
        ):
            found["saes"][0]["lists"]["feature_pages"]["numbers"] = numbers
            write_sealed(path, found)
            assert says in refused(options(server))
        found["saes"][0]["lists"]["feature_pages"]["numbers"] = [1, 77]
        write_sealed(path, found)
        ran = pipeline(*options(server))
    assert ran.status == 0, ran.out
    assert f"explain: 1 features of {HOOK} are left out: each fires on no held-out row" in ran.out


def test_an_endpoint_that_does_not_answer_is_said_before_any_work(folder):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = refused(["explain", "--base-url", f"http://127.0.0.1:{port}/v1", "--model", "x", *EVALUATED])
    assert f"explain.runtime.base_url: http://127.0.0.1:{port}/v1: does not answer" in said
    assert not list(Path("runs/explain").glob("*"))


def test_each_refusal_of_an_endpoint_has_its_way_out(folder):  # noqa: F811
    ways = {
        402: "wants to be paid first (HTTP 402: as the test says)",
        405: "does not speak the OpenAI protocol (HTTP 405: as the test says); most addresses end in /v1",
        429: "takes no calls now (HTTP 429: as the test says); start again later",
        503: "cannot answer (HTTP 503: as the test says); look at what the server logs",
    }
    with serving(oracle) as server:
        for server.status, says in ways.items():
            said = refused(options(server, "explain.runtime.tries=1"))
            assert f"explain.runtime.base_url: {server.url}: {says}" in said


def test_a_model_is_needed(folder):  # noqa: F811
    assert "explain: no model to ask: give --model NAME" in refused(["explain"])
    assert "explain.model: this setting is required" in refused(["explain", "--base-url", "http://localhost/v1"])


def test_the_key_is_sent_and_written_nowhere(folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ORACLE_KEY", "sk-very-secret")
    with serving(oracle) as server:
        server.key = "sk-very-secret"
        assert "wants a key" in refused(options(server, "--feature", "1"))
        out = explain(server, "--feature", "1", "explain.runtime.api_key_env=ORACLE_KEY")
    assert "very-secret" not in out
    assert not [path for path in folder.rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]


def test_text_leaves_this_machine_only_after_a_yes(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(explaining, "is_here", lambda _url: False)
    with serving(oracle) as server:
        said = refused(options(server, "--feature", "1"))
        assert f"text of chat (local files), reasoning (local files) would leave this machine for {server.url}" in said
        assert not server.answered
        explain(server, "--feature", "1", "--yes")
        assert server.answered


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:11434", True),
        ("http://[::1]:8080/v1", True),
        ("http://192.168.1.7:8000/v1", False),
        ("https://openrouter.ai/api/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://0.0.0.0:8000/v1", False),
    ],
)
def test_where_an_address_is(url, here):
    assert is_here(url) == here


def test_settings_may_hold_all_of_it(folder):  # noqa: F811
    with serving(oracle) as server:
        settings = [f"explain.model={MODEL}", f"explain.runtime.base_url={server.url}", "explain.feature_ids=[1]"]
        settings += [*EVALUATED, "explain.tokens=8"]
        assert pipeline("explain", *settings).status == 0
        explain(server, "--feature", "1")  # the same
    assert pipeline("path", "explain", *settings).out.strip() == str(run_of(folder).relative_to(folder))
    assert f"explain   complete   {run_of(folder).relative_to(folder)}" in pipeline("status", *settings).out
    assert "have no section `explain`" in pipeline("path", "explain", *EVALUATED).out
    assert pipeline("run", *settings).status == 0
    written = read_json(run_of(folder) / "begun.json")["settings"]
    assert (written["model"], written["feature_ids"]) == (MODEL, [1])
    assert "runtime" not in written


def test_status_verify_and_prune_know_it(folder):  # noqa: F811
    with serving(oracle) as server:
        explain(server, "--feature", "1")
        place = run_of(folder).relative_to(folder)
        assert f"explain   complete   {place}" in pipeline("status", *EVALUATED).out  # settings that have none
        kept = pipeline("prune", *EVALUATED, "--yes").out
        assert "nothing to delete" in kept
        assert place.is_dir()
        (place / "metrics.json").write_text("{}")
        own = (f"explain.model={MODEL}", "explain.feature_ids=[1]", "explain.tokens=8")
        for settings in (own, ()):
            ran = pipeline("verify", *EVALUATED, *settings)
            assert ran.status == 1
            assert ran.out.count(f"{place}/metrics.json: missing, or changed since the stage ended") == 1
            assert "`make explain` makes it anew, from the answers that it has" in ran.out
        assert "would start over" in pipeline("status", *EVALUATED).out
        asked = server.answered.total()
        assert "is made anew" in explain(server, "--feature", "1")
        assert server.answered.total() == asked
    shutil.rmtree(only(folder, "runs/evaluate/*"))
    assert f"deleted  {place}" in pipeline("prune", *EVALUATED, "--yes").out
    assert not place.exists()


def test_an_export_has_the_explanations_and_a_push_of_closed_text_has_not(folder):  # noqa: F811
    with serving(oracle) as server:
        explain(server, "--feature", "1", "--feature", "2")
        explain(server, "--feature", "2", "--feature", "3")
    exported = pipeline("export", "--model-name", "tiny/llama", *EVALUATED)
    assert exported.status == 0, exported.out
    (path,) = Path(exported.out.strip()).glob("*/explanations.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == [1, 2, 3]
    assert {line["modelId"] for line in lines} == {"tiny/llama"}
    assert {line["explanationModelName"] for line in lines} == {MODEL}
    of = {e["feature"]: e for p in folder.glob("runs/explain/*/explanations-*.json") for e in read_json(p)["features"]}
    assert all(line["description"] == of[line["index"]]["sentence"] for line in lines)
    assert lines[0]["detection"] == of[1]["detection"]
    said = pipeline("push", "me/mine", *EVALUATED).out
    assert "explanations.jsonl, which may quote text of chat (local files)" in said
    pushed = pipeline("push", "me/mine", *EVALUATED, "--with-text").out
    assert "which may quote" not in pushed
    assert "blocks.1.hook_resid_post/explanations.jsonl" in pushed
