"""The report's section on text: what became of the rows, as the sample's manifest has it."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import oddities
from conftest import only, pipeline

from evaluate.figures import read_figures
from evaluate.report import write_report

COLUMNS = ["rows", "train_documents", "holdout_documents", "rows_dropped", "rows_filtered"]
COLUMNS += ["rows_not_needed", "rows_not_reached"]
HOOK = "model.layers.1"


def written(folder: Path, sample: dict[str, Any] | None, path: Path) -> str:
    """The report of a run, with another sample's manifest or none."""
    names = ("sample", "harvest", "train")
    manifests = {name: json.loads(only(folder, f"runs/{name}/*/manifest.json").read_text()) for name in names}
    manifests = {name: manifest for name, manifest in manifests.items() if name != "sample"}
    if sample:
        manifests = {"sample": sample} | manifests
    else:
        manifests["harvest"]["settings"]["ingest"] = {"path": "rows"}
    evaluation = read_figures(only(folder, "runs/evaluate/*"))
    write_report(path, evaluation, {HOOK: only(folder, f"runs/train/*/{HOOK}/metrics.jsonl")}, manifests)
    return path.read_text()


def cells(html: str, kind: str) -> list[list[str]]:
    """What stands in the table of a class, by line."""
    table = re.search(rf'<table class="{kind}">(.*?)</table>', html, re.DOTALL)
    assert table
    return [re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", table[1]) if "<td>" in line]


def test_the_report_says_what_became_of_every_row(finished, fresh_folder):
    lines = oddities.lines(1500, seed=3)
    odd = '{"conversation": [{"role": "<b>x\\u202e", "content": "x"}], "kind": "a"}'
    Path("odd.jsonl").write_text("".join(f"{row}\n" for row in [odd, *lines]), "utf-8", "surrogateescape")
    odd_source = "{name: odd, path: odd.jsonl, rows: conversation, share: 0.5, drop: any, where: {kind: [a, b]}}"
    chat = "{name: chat, path: assets/tiny-chat.jsonl, rows: conversation, share: 0.5}"
    budget = ("sample.train_tokens=12000", "sample.holdout_tokens=2560", "evaluate.reason_score=null")
    ran = pipeline("sample", f"sample.sources=[{odd_source}, {chat}]", *budget)
    assert ran.status == 0, ran.out
    manifest = json.loads(only(fresh_folder, "runs/sample/*/manifest.json").read_text())
    counts = manifest["summary"]["odd"]
    counts["dropped"]["role is unknown"] |= {"row": 0, "found": "<b>x\u202e"}
    html = written(finished, manifest, fresh_folder / "report.html")

    assert "<p>Template: <code>chatml</code>. BOS: none.</p>" in html
    found = {name: [int(number.replace(",", "")) for number in rest] for name, *rest in cells(html, "rows")}
    assert found == {name: [manifest["summary"][name][column] for column in COLUMNS] for name in ("odd", "chat")}
    assert found["odd"][0] == sum(found["odd"][1:]) == 1501
    assert all(number > 0 for number in found["odd"][1:5])
    assert found["chat"][0] == sum(found["chat"][1:]) == 120

    reasons = [(name, int(rows), what, unescape(reason)) for name, rows, what, reason, _ in cells(html, "reasons")]
    assert sorted(reasons) == sorted(
        ("odd", kept["rows"], said, reason)
        for kind, said in (("dropped", "dropped"), ("cut", "cut before that turn"))
        for reason, kept in counts[kind].items()
    )
    dropped = [rows for _, rows, what, _ in reasons if what == "dropped"]
    assert dropped == sorted(dropped, reverse=True)
    assert sum(dropped) == found["odd"][3]
    assert "row 0: <code>&lt;b&gt;x\\u202e</code>" in html
    assert f"odd: {counts['rows_malformed']} answers have thinking tags that do not pair" in html
    assert counts["rows_malformed"] > 0


def test_where_no_row_was_dropped_there_are_no_reasons(finished):
    html = only(finished, "runs/evaluate/*/report.html").read_text()
    assert len(cells(html, "rows")) == 2
    assert 'table class="reasons"' not in html
    assert "do not pair" not in html


def test_ingested_rows_have_no_text(finished, tmp_path):
    html = written(finished, None, tmp_path / "report.html")
    assert 'id="text"' not in html
