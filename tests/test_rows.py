"""What becomes of each row, held against a reader of its own."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import oddities
import pytest
import tiny

from harvest.config import SampleConfig
from harvest.conversations import read_row
from harvest.documents import DocumentTokenizer
from harvest.files import UserError
from harvest.packing import PackedSource
from harvest.progress import Progress
from harvest.rows import Damaged
from harvest.sources import open_source
from harvest.templates import Refused

ROLE = {"user": "user", "human": "user", "system": "system", "developer": "system", "tool": "tool", "function": "tool"}
ROLE |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant")
WORDS = {int: "a number", float: "a number", bool: "true or false", type(None): "null", str: "text", list: "a list"}
TAG = r"(</?think>|<\|(?:begin|end)_of_thought\|>)"


class Drop(Exception):  # noqa: N818
    pass


def expected(line: str) -> tuple[str, Any]:
    """Where a row belongs: ("used", its turns), ("filtered", None) or ("dropped", the reason)."""
    try:
        row = json.loads(line)
    except ValueError:
        return "dropped", "not valid JSON"
    if not isinstance(row, dict):
        return "dropped", "not a JSON object"
    if row["kind"] == "c":
        return "filtered", None
    try:
        turns = []
        for item in items(row.get("conversation")):
            try:
                turns.append(turn(item))
            except Drop:
                roles = "".join(each[0][0] for each in turns)
                if not re.search("u.*a", roles):
                    raise
                break
        if not any(each[0] == "user" for each in turns):
            raise Drop("no user turn")
    except Drop as error:
        return "dropped", str(error)
    for each in turns:
        if halves := re.findall("[\ud800-\udfff]", "".join(map(str, each))):
            return "dropped", "not UTF-8 text" if halves[0] >= "\udc80" else "half of a surrogate pair"
    return "used", turns


def items(value: Any) -> list[Any]:
    value = json.loads(value) if isinstance(value, str) and value[0] in "[{" else value
    if isinstance(value, dict):
        if not all(isinstance(each, list) for each in value.values()):
            raise Drop("conversation is an object, not a list of turns")
        value = [{name: each[i] for name, each in value.items()} for i in range(len(next(iter(value.values()))))]
    if not isinstance(value, list):
        raise Drop(f"conversation is {WORDS[type(value)]}, not a list of turns")
    if not value:
        raise Drop("conversation is empty")
    return value


def turn(item: Any) -> tuple[str, str, str | None, str]:
    if not isinstance(item, dict):
        raise Drop(f"turn is {WORDS[type(item)]}, not an object")
    named, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if str(named).lower() not in ROLE:
        raise Drop("role is unknown")
    role = ROLE[str(named).lower()]
    if isinstance(content, list):
        parts = [part["text"] if isinstance(part, dict) and "text" in part else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise Drop("content has a part that is not text")
        content = "".join(parts)
    given = next((item[name] for name in ("reasoning_content", "thinking", "reasoning") if item.get(name)), "").strip()
    if content is None and given and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise Drop(f"content is {WORDS[type(content)]}")
    before, thought, after = answer(content, given) if role == "assistant" else ("", None, content)
    if not after.strip() and not thought:
        raise Drop("content is empty")
    return role, after, thought, before


def answer(text: str, given: str) -> tuple[str, str | None, str]:
    pieces = re.split(TAG, text)  # texts and tags in turn
    tags = ["end" if "/" in tag or "end" in tag else "begin" for tag in pieces[1::2]]
    if tags[:1] == ["end"]:
        pieces, tags = ["", pieces[1].replace("/", "").replace("end", "begin"), *pieces], ["begin", *tags]
    styles = ["think>" in tag for tag in pieces[1::2]]
    if tags != ["begin", "end"] * (len(tags) // 2) or styles[::2] != styles[1::2] or not tags:
        return "", given or None, text
    outside = [re.sub(r"\s*<\|\w+_of_solution\|>\s*", "\n\n", piece).strip() for piece in pieces[::4]]
    thoughts = [given, *(piece.strip() for piece in pieces[2::4])]
    return outside[0], "\n\n".join(filter(None, thoughts)), "\n\n".join(filter(None, outside[1:]))


CONFIG = {
    "sources": [{"name": "odd", "path": "odd.jsonl", "rows": "conversation", "share": 1, "drop": "any"}],
    "template": "chatml",
    "context_size": 16,
    "shard_contexts": 64,
    "train_tokens": 1 << 20,
    "holdout_tokens": 1 << 20,
    "holdout_fraction": 0.25,
}


def odd_config(**source: Any) -> SampleConfig:
    where = {"kind": ["a", "b"]}
    return SampleConfig.model_validate(CONFIG | {"sources": [CONFIG["sources"][0] | {"where": where} | source]})


@pytest.fixture
def odd_rows(tmp_path, monkeypatch) -> list[str]:
    """2,000 rows in odd.jsonl of the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = oddities.lines(2000, seed=3)
    Path("odd.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8", "surrogateescape")
    return rows


def test_every_row_is_where_a_reader_of_its_own_says(odd_rows):
    config = odd_config()
    opened = open_source(config.sources[0], None, offline=True)
    kinds = Counter()
    for line, row in zip(odd_rows, opened.rows.take(range(2000), opened.columns), strict=True):
        place, what = expected(line)
        kinds[place, what if place == "dropped" else ""] += 1
        if isinstance(row, Damaged):
            assert place == "dropped" and row.reason.startswith(what), line
        elif row["kind"] != "c":
            reading = read_row("conversation", row)
            assert (place == "dropped") == bool(reading.dropped), line
            assert [tuple(each) for each in reading.turns] == (what if place == "used" else []), line
            assert not reading.dropped or reading.dropped.reason == what, line
    assert len(kinds) >= 20  # every reason is there, and each place
    assert kinds["used", ""] > 700 and kinds["filtered", ""] > 400


def test_used_and_dropped_by_reason_are_all_rows(odd_rows, monkeypatch):
    refusing = {"ask 40": "refused: no system", "ask 77": "refused: no system"}

    def composed(self, document):
        if reason := refusing.get(document[0].content):
            raise Refused(reason)
        return compose(self, document)

    compose = DocumentTokenizer.compose
    monkeypatch.setattr(DocumentTokenizer, "compose", composed)
    tokenizer = DocumentTokenizer(tiny.tokenizer(), odd_config())
    scratch = Path("scratch")
    scratch.mkdir()
    opened = open_source(odd_config().sources[0], None, offline=True)
    contexts = {"train": 20_000, "holdout": 20_000}  # more than there is: no row is left out as not needed
    source = PackedSource(0, odd_config(), tokenizer, str(opened.content), contexts, scratch)
    with Progress("", 0, "", quiet=True) as progress, pytest.raises(UserError, match="add text"):
        source.pack(progress)

    places = {number: expected(line) for number, line in enumerate(odd_rows)}
    reasons = Counter(what for place, what in places.values() if place == "dropped")
    used = {number for number, (place, _) in places.items() if place == "used"}
    refused = {n for n in used if places[n][1][0][1] in refusing}
    assert refused
    counts = source.counts
    dropped = {reason.partition(" (")[0]: kept["rows"] for reason, kept in counts.dropped.items()}
    merged = Counter()
    for reason, kept in counts.dropped.items():
        merged[reason.partition(" (")[0]] += kept["rows"]
        assert kept["row"] in refused or places[kept["row"]][1] == reason.partition(" (")[0]
    assert dropped.keys() == merged.keys()
    assert merged == reasons + Counter({"refused: no system": len(refused)})
    assert counts.filtered == sum(place == "filtered" for place, _ in places.values())
    assert sum(counts.used.values()) == len(used - refused)
    assert counts.not_needed == 0
    assert sum(counts.used.values()) + counts.dropped_rows + counts.filtered == 2000
    rows = set()
    for split in ("train", "holdout"):
        filled = source._lanes[split][0].filled
        rows |= set(np.unique(source._files[split].documents[:filled]).tolist())
    assert rows == used - refused
    cut = {n for n in used - refused if len(places[n][1]) < len(items(json.loads(odd_rows[n])["conversation"]))}
    assert sum(kept["rows"] for kept in counts.cut.values()) == len(cut) > 50
