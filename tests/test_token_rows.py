"""Rows of token ids as SAELens writes them, where a BOS stands in packed contexts, and what is counted of rows."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import zarr
from conftest import contents, only, pipeline
from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig

from harvest.config import ModelConfig
from harvest.conversations import is_held_out, read_row
from harvest.files import read_json
from harvest.tokenizer import load_whole_tokenizer

NO_SCORE = "evaluate.reason_score=null"
BOS = "<｜begin▁of▁sentence｜>"


def settings(rows: str, path: str, train: int, holdout: int, more: str = "") -> list[str]:
    return [
        f"sample.sources=[{{name: t, path: {path}, rows: {rows}, share: 1{more}}}]",
        *(NO_SCORE, f"sample.train_tokens={train}", f"sample.holdout_tokens={holdout}"),
    ]


def sampled(*change: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any], str]:
    """Tokens and documents by split, the manifest's summary, and what was printed."""
    ran = pipeline("sample", *change)
    assert ran.status == 0, ran.out
    directory = Path(pipeline("path", "sample", *change).out.strip())
    group = zarr.open_group(str(directory / "contexts"), mode="r")
    tokens, documents = ({s: group[f"{s}/{name}"][:] for s in ("train", "holdout")} for name in ("tokens", "document"))
    return tokens, documents, read_json(directory / "manifest.json")["summary"], ran.out


def side(ids: list[int]) -> str:
    """The split of a row of ids, by its content."""
    return "holdout" if is_held_out(read_row("tokens", {"tokens": ids}).key, 0, 0.25) else "train"


def shards(rows: int) -> int:
    """Tokens of whole shards of 16 contexts that so many contexts fill."""
    return rows // 16 * 256


@pytest.fixture
def pretokenized(fresh_folder, monkeypatch) -> datasets.Dataset:
    """A set that SAELens' own runner wrote to `set`, contexts of 16."""
    tiny.write_jsonl(Path("text.jsonl"), [{"text": tiny.text(random.Random(n), 40)} for n in range(120)])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", fresh_folder / "cache")
    config = PretokenizeRunnerConfig(
        tokenizer_name="assets/tiny-llama",
        dataset_path="json",
        data_files=["text.jsonl"],
        context_size=16,
        num_proc=1,
        shuffle=False,
        begin_batch_token="eos",
        sequence_separator_token="eos",
        save_path="set",
    )
    return PretokenizeRunner(config).run()


def test_a_set_of_saelens_is_read_as_it_is(pretokenized):
    rows = pretokenized["input_ids"]
    sides = np.array([side(list(row)) for row in rows])
    tokens, documents, summary, _ = sampled(
        *settings("tokens", "set", shards((sides == "train").sum()), shards((sides == "holdout").sum()))
    )
    for split in ("train", "holdout"):
        assert len(tokens[split]) == (sides == split).sum() // 16 * 16 > 0
        for context, document in zip(tokens[split], documents[split], strict=True):
            assert len(set(document.tolist())) == 1 and sides[document[0]] == split
            assert context.tolist() == list(rows[int(document[0])])
        assert len(np.unique(documents[split][:, 0])) == len(documents[split])  # each row once
    assert summary["bos"] == "none"
    assert summary["t"]["rows"] == len(rows)


def test_both_names_of_the_column_and_equal_rows_on_one_side(fresh_folder):
    rng = np.random.default_rng(0)
    different = [rng.integers(10, 300, 16).tolist() for _ in range(60)]
    rows = [different[i % 60] for i in range(180)]
    found = []
    for name in ("input_ids", "tokens"):
        datasets.Dataset.from_list([{name: row, "attention_mask": [1] * 16} for row in rows]).to_parquet(
            f"{name}.parquet"
        )
        tiny.write_jsonl(Path(f"{name}.jsonl"), [{name: row} for row in rows])
        found += [sampled(*settings("tokens", f"{name}.{kind}", 1024, 256))[0] for kind in ("parquet", "jsonl")]
    assert all(np.array_equal(each[split], found[0][split]) for each in found for split in ("train", "holdout"))
    train, holdout = ({tuple(row) for row in found[0][split].tolist()} for split in ("train", "holdout"))
    assert train and holdout and not train & holdout
    assert train | holdout <= {tuple(row) for row in different}


def test_rows_of_other_lengths(fresh_folder):
    """Whole contexts stay whole; what is left of others is packed in the order of the rows, and nothing is lost."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(10, 300, rng.choice([5, 16, 21, 48])).tolist() for _ in range(260)]
    tiny.write_jsonl(Path("t.jsonl"), [{"tokens": row} for row in rows])
    tokens, documents, summary, _ = sampled(*settings("tokens", "t.jsonl", 2048, 512))
    for split in ("train", "holdout"):
        whole = 0
        for context, document in zip(tokens[split], documents[split], strict=True):
            places = 0
            while places < 16:
                row = rows[document[places]]
                end = places + int((document[places:] == document[places]).sum())
                piece = context[places:end].tolist()
                assert side(row) == split
                assert any(row[i : i + len(piece)] == piece for i in range(len(row))), (row, piece)
                places = end
            if len(set(document.tolist())) == 1 and len(rows[document[0]]) % 16 == 0:
                start = [rows[document[0]][i : i + 16] for i in range(0, len(rows[document[0]]), 16)]
                assert context.tolist() in start
                whole += 1
            else:
                assert all(len(rows[number]) % 16 for number in set(document.tolist()))
        assert whole
    counts = summary["t"]
    assert counts["rows_used"] + counts["rows_not_needed"] + counts["rows_not_reached"] == 260


def test_ids_beyond_the_vocabulary_end_the_sample(fresh_folder):
    vocabulary = len(tiny.tokenizer())
    rows = [[20 + i] * 16 for i in range(200)]
    for largest, status in ((vocabulary - 1, 0), (vocabulary, 1)):
        rows[0] = [largest] + [5] * 15
        tiny.write_jsonl(Path("t.jsonl"), [{"tokens": row} for row in rows])
        ran = pipeline("sample", *settings("tokens", "t.jsonl", 256 * 9, 256 * 2))
        assert ran.status == status, ran.out
    assert f"t.jsonl, line 1: the token id {vocabulary} is beyond the vocabulary of model.name" in ran.out


# Where a BOS stands.


@pytest.fixture
def with_bos(fresh_folder) -> Path:
    """The tiny model with a BOS, and 200 texts in t.jsonl."""
    path = fresh_folder / "assets" / "tiny-llama" / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"bos_token": BOS}), encoding="utf-8")
    rows = [{"text": tiny.text(random.Random(n), 5 + n % 30)} for n in range(200)]
    tiny.write_jsonl(Path("t.jsonl"), rows)
    return fresh_folder


@pytest.mark.parametrize("bos", ["document", "context", "none"])
def test_contexts_are_the_stream_of_documents_with_a_bos_where_it_is_set(with_bos, bos):
    tokens, documents, summary, out = sampled(*settings("text", "t.jsonl", 1024, 256), f"sample.bos={bos}")
    loaded = load_whole_tokenizer(ModelConfig(name="assets/tiny-llama"), None, offline=True)
    first, eos = loaded.bos_token_id, loaded.eos_token_id
    texts = [json.loads(line)["text"] for line in Path("t.jsonl").read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng([0, 0]).permutation(len(texts))
    for number, split in enumerate(("train", "holdout")):
        stream, owner, width = [], [], 16 - (bos == "context")
        for row in order:
            if (split == "holdout") == is_held_out(texts[row], 0, 0.25):
                ids = loaded(texts[row], add_special_tokens=False)["input_ids"]
                ids = [first] * (bos == "document") + ids + [eos]
                stream += ids
                owner += [row] * len(ids)
        count = len(tokens[split])
        expected = np.array(stream[: count * width]).reshape(count, width)
        expected_owner = np.array(owner[: count * width]).reshape(count, width)
        if bos == "context":
            expected = np.concatenate([np.full((count, 1), first), expected], 1)
            expected_owner = np.concatenate([expected_owner[:, :1], expected_owner], 1)
        shuffled = np.random.default_rng([0, 1 + number]).permutation(count)
        assert np.array_equal(tokens[split], expected[shuffled])
        assert np.array_equal(documents[split], expected_owner[shuffled])
        if bos != "document":
            assert (tokens[split] == first).sum() == (count if bos == "context" else 0)
    assert summary["bos"] == bos
    assert read_json(only(with_bos, "runs/sample/*/contexts/zarr.json"))["attributes"]["bos"] == bos
    assert (f"a BOS ({BOS}) begins each {bos}" in out) is (bos != "none")


# What is counted.

COUNTED = ("rows_used", "rows_dropped", "rows_filtered", "rows_not_needed", "rows_not_reached")


def test_the_counts_of_the_tiny_default_are_all_rows(finished):
    summary = read_json(only(finished, "runs/sample/*/manifest.json"))["summary"]
    for name in ("chat", "reasoning"):
        counts = summary[name]
        assert sum(counts[each] for each in COUNTED) == counts["rows"] == 120
        assert counts["rows_used"] == counts["train_documents"] + counts["holdout_documents"] > 0
        assert counts["rows_dropped"] == counts["rows_filtered"] == 0
        assert counts["rows_not_reached"] > 0


def mixed(bad: int, good: int = 300) -> None:
    """t.jsonl with so many rows that hold nothing, spread among the good ones, and one kind in ten filtered."""
    rows: list[dict] = [
        {"text": tiny.text(random.Random(n), 12), "kind": "b" if n % 10 == 0 else "a"} for n in range(good)
    ]
    rows += [{"text": (None, "", 7)[n % 3], "kind": "a"} for n in range(bad)]
    random.Random(0).shuffle(rows)
    tiny.write_jsonl(Path("t.jsonl"), rows)


def test_counts_are_shown_and_kept(fresh_folder):
    mixed(bad=60)
    for train in (256, 1024):
        change = settings("text", "t.jsonl", train, 256, ", where: {kind: a}")
        _, documents, summary, out = sampled(*change)
        counts = summary["t"]
        assert sum(counts[each] for each in COUNTED) == counts["rows"] == 360
        used = {int(row) for split in documents.values() for row in np.unique(split)}
        assert counts["rows_used"] == len(used)
        rows = [json.loads(line) for line in Path("t.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(rows[row]["kind"] == "a" and rows[row]["text"] for row in used)
        order = np.random.default_rng([0, 0]).permutation(360)[: 360 - counts["rows_not_reached"]]
        seen = [rows[row] for row in order]
        assert counts["rows_filtered"] == sum(row["kind"] == "b" for row in seen)
        bad = [row["text"] for row in seen if row["kind"] == "a" and not isinstance(row["text"], str)]
        empty = sum(row["text"] == "" for row in seen)
        assert counts["rows_dropped"] == len(bad) + empty > 0
        reasons = {reason: kept["rows"] for reason, kept in counts["dropped"].items()}
        named = {"text is null": bad.count(None), "text is empty": empty, "text is a number": bad.count(7)}
        assert reasons == {reason: number for reason, number in named.items() if number}
        read = counts["rows"] - counts["rows_not_reached"] - counts["rows_filtered"]
        assert f"sample.sources.0 (t): warning: {counts['rows_dropped']} of {read} rows read were dropped: " in out
        for reason, kept in counts["dropped"].items():
            assert f"{kept['rows']} {reason} (as t.jsonl, line {kept['row'] + 1})" in out
            assert {"text is null": None, "text is empty": "", "text is a number": 7}[reason] == rows[kept["row"]][
                "text"
            ]
        assert counts["rows_not_reached"] > 0


@pytest.mark.parametrize(("bad", "warns"), [(0, None), (2, False), (5, True)])
def test_one_in_a_hundred_is_a_warning(fresh_folder, bad, warns):
    mixed(bad)
    # Every row but the few that fill the last contexts is read: more than one split can take.
    out = sampled(*settings("text", "t.jsonl", 256 * 11, 256 * 3))[3]
    assert ("rows read were dropped" in out) is (warns is not None)
    assert ("warning" in out) is bool(warns)


def test_more_than_half_ends_the_sample_and_what_was_complete_stays(fresh_folder):
    mixed(bad=0)
    change = settings("text", "t.jsonl", 512, 256)
    sampled(*change)
    before = contents(Path("runs/sample"))
    mixed(bad=450)
    ran = pipeline("sample", *change)
    assert ran.status == 1
    assert "rows hold nothing usable in text: " in ran.out
    assert "go on without them with sample.sources.0.drop: any" in ran.out
    assert {name: data for name, data in contents(Path("runs/sample")).items() if name in before} == before
    counts = sampled(*settings("text", "t.jsonl", 512, 256, ", drop: any"))[2]["t"]
    assert counts["rows_dropped"] > counts["rows_used"] > 0
    assert sum(counts[each] for each in COUNTED) == 750
