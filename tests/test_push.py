import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from conftest import pipeline
from huggingface_hub import constants

from harvest.files import read_json
from pipeline import export

TOKEN = "hf_of_a_test"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a commit of small files needs."""

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        answer = {}
        if self.path.endswith("/create"):
            answer = {"url": "https://huggingface.co/me/sae", "name": "me/sae"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": "https://huggingface.co/me/sae/commit/1", "commitOid": "1", "success": True}
        data = json.dumps(answer if server.status == 200 else {"error": "no"}).encode()
        self.send_response(server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.status, server.seen = 200, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def exported(run_folder) -> Path:
    assert pipeline("export").status == 0
    return run_folder


def pushed(hub) -> dict[str, bytes]:
    body = next(body for path, _, body in hub.seen if "/commit/" in path)
    lines = [json.loads(line) for line in body.splitlines()]
    return {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}


def test_nothing_is_pushed_without_yes(exported, hub):
    ran = pipeline("push", "me/sae")
    assert ran.status == 0, ran.out
    assert "blocks.1.hook_resid_post/sae_weights.safetensors" in ran.out
    assert "nothing was pushed to me/sae; --yes" in ran.out
    assert hub.seen == []


def test_a_repository_is_an_owner_and_a_name(exported, hub):
    for name in ("", "sae", "me/", "a/b/c", "../sae"):
        ran = pipeline("push", name)
        assert ran.status == 1
        assert f"push: {name!r}: a repository of the hub is OWNER/NAME" in ran.out


def test_one_commit_without_text_and_without_the_token(exported, hub):
    ran = pipeline("push", "me/sae", "--yes")
    assert ran.status == 0, ran.out
    files = pushed(hub)
    export = next(Path("runs/export").iterdir())
    for name in ("README.md", "blocks.1.hook_resid_post/cfg.json", "blocks.1.hook_resid_post/sae_weights.safetensors"):
        assert files[name] == (export / name).read_bytes()
    assert not [name for name in files if name.endswith(".html")]
    assert any(name.endswith("metrics.json") for name in files)
    assert "left out" in ran.out and "--with-text" in ran.out
    assert all(authorization == f"Bearer {TOKEN}" for _, authorization, _ in hub.seen)
    create = next(json.loads(body) for path, _, body in hub.seen if path.endswith("/create"))
    assert create.get("private") is True or create.get("visibility") == "private"
    assert TOKEN not in ran.out
    assert not [p for p in Path().rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_metrics_go_without_what_they_quote(exported, hub, tmp_path):
    assert pipeline("push", "me/sae", "--yes").status == 0
    (place,) = (name for name in pushed(hub) if name.endswith("metrics.json"))
    there = tmp_path / "metrics.json"
    there.write_bytes(pushed(hub)[place])
    found, own = read_json(there, sealed=True), read_json(Path("runs") / place.replace("evaluation", "evaluate"))
    features = own["saes"][0]["lists"]["token_injection"]["features"]
    assert any(feature["example"] for feature in features) and any(feature["ngrams"] for feature in features)
    for feature in features:
        feature["example"] = feature["ngrams"] = []
    assert found == own


def test_text_goes_only_when_told_or_open(exported, hub, monkeypatch):
    assert pipeline("push", "me/sae", "--yes", "--with-text").status == 0
    files = pushed(hub)
    assert any(name.endswith("report.html") for name in files)
    (place,) = (name for name in files if name.endswith("metrics.json"))
    assert files[place] == (Path("runs") / place.replace("evaluation", "evaluate")).read_bytes()
    monkeypatch.setattr(
        export, "SHIPPED", dict.fromkeys(("assets/tiny-chat.jsonl", "assets/tiny-reasoning.jsonl"), "mit")
    )
    assert "report.html" in pipeline("push", "me/sae").out


@pytest.mark.parametrize(("status", "message"), [(401, "not valid"), (403, "may not write")])
def test_the_hub_refuses(exported, hub, status, message):
    hub.status = status
    ran = pipeline("push", "me/sae", "--yes")
    assert ran.status == 1
    assert message in ran.out


def test_nobody_is_logged_in(exported, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    ran = pipeline("push", "me/sae", "--yes")
    assert ran.status == 1
    assert "nobody is logged in" in ran.out
    assert hub.seen == []


def test_no_network(exported, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    ran = pipeline("push", "me/sae", "--yes")
    assert ran.status == 1
    assert "the hub cannot be reached" in ran.out


def test_an_export_of_other_settings(exported, hub):
    (made,) = Path("runs/export").iterdir()
    ran = pipeline("push", "me/sae", "--yes", "--folder", str(made), "train.lr=2e-3")
    assert ran.status == 1
    assert f"push: {made}: was exported from other settings; export anew, or give those settings" in ran.out
    assert hub.seen == []


def test_there_is_no_export(run_folder, hub):
    ran = pipeline("push", "me/sae", "--yes")
    assert ran.status == 1
    assert "there is no export" in ran.out
    Path("mine").mkdir()
    ran = pipeline("push", "me/sae", "--yes", "--folder", "mine")
    assert ran.status == 1
    assert "not an export of this project" in ran.out
    assert hub.seen == []
