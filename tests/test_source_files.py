"""Which files a source takes, and that each kind is read as `datasets` reads it, or better."""

import bz2
import gzip
import json
import lzma
import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import tiny
from conftest import TINY, pipeline

from harvest.config import Source
from harvest.files import UserError
from harvest.rows import FIRST_ROWS, Damaged
from harvest.sources import OpenedSource, open_source
from pipeline.config import load
from pipeline.fingerprint import find_inputs

ROWS = [{"text": "so even"}, {"text": "é 😀 \n\u2028 two"}, {"text": '{"a": [1, "]"]}, \\'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()


def opened(path: str | Path, **settings: Any) -> OpenedSource:
    source = Source.model_validate({"name": "s", "path": str(path), "rows": "text", "share": 1} | settings)
    return open_source(source, None, offline=True)


def texts(path: str | Path, **settings: Any) -> list[Any]:
    """The texts of a source, or why a row has none."""
    source = opened(path, **settings)
    rows = source.rows.take(range(len(source.rows)), source.columns)
    return [row.reason if isinstance(row, Damaged) else row["text"] for row in rows]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, as the current one and as the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


AS_DATASETS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n"),
    "end.jsonl": LINES.rstrip(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "list.json": LIST,
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "lines.json": LINES,
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "beside.json": "".join(json.dumps(row) for row in ROWS).encode(),
    "two.jsonl": b'{"text": "so"}{"text": "even"}\n{"text": "is"}\n{"text": "two"} {"text": "odd"}\n',
    "one.json": b'{"text": "only"}',
    "texts.json": b'["so", "even"]',
    "a.jsonl.gz": gzip.compress(LINES),
    "list.json.gz": gzip.compress(LIST),
    "named.jsonl": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.json.xz": lzma.compress(LINES),
    "A.JSONL": LINES,
    "A.JSONL.GZ": gzip.compress(LINES),
}


def test_files_are_read_as_datasets_reads_them(here):
    for name, data in AS_DATASETS.items():
        Path(name).write_bytes(data)
        theirs = datasets.load_dataset("json", data_files=name, split="train", cache_dir="cache")
        assert texts(name) == list(theirs["text"]), name
    datasets.Dataset.from_list(ROWS * 900).to_parquet("many.parquet", batch_size=700)
    assert texts("many.parquet") == [row["text"] for row in ROWS * 900]


def test_files_that_datasets_does_not_read(here):
    Path("a.jsonl.zst").write_bytes(zstd(LINES))
    for name in ("a.jsonl.zst", "~/a.jsonl.zst", "~/*.jsonl.*"):
        assert texts(name) == [row["text"] for row in ROWS], name
    Path("data.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    with pytest.raises(UserError, match="needs the column text; the data set has data, version"):
        texts("data.json")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_half_copied_file_is_named(here, kind):
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[kind](LINES * 50)
    Path(f"a.jsonl.{kind}").write_bytes(packed[: len(packed) - 40])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{kind}: cannot be unpacked as .* half copied"):
        texts(f"a.jsonl.{kind}")


# Columns that are not needed.

STRANGE = [
    b'{"text": "one", "extra": null, "mixed": 1, "when": "2024-01-01"}',
    b'{"text": "2024-05-06", "extra": {"deep": [1]}, "mixed": "two", "when": 5}',
    b'{"text": "2024-05-06T07:08:09", "mixed": [null], "bytes": "\xff\xfe", "more": 1e400}',
    b'{"text": "four", "extra": "text", "mixed": {"a": 1}, "half": "\\ud800"}',
]
STRANGE_TEXTS = ["one", "2024-05-06", "2024-05-06T07:08:09", "four"]


@pytest.mark.parametrize("form", ["lines", "list"])
def test_columns_that_are_not_needed_stop_nothing(here, form):
    name = {"lines": "a.jsonl", "list": "a.json"}[form]
    data = b"\n".join(STRANGE) if form == "lines" else b"[" + b",\n".join(STRANGE) + b"]"
    Path(name).write_bytes(data)
    assert texts(name) == STRANGE_TEXTS
    Path("dates.jsonl").write_text('{"text": "2024-05-06"}\n' * 2)
    assert texts("dates.jsonl") == ["2024-05-06"] * 2


def test_a_column_that_begins_late_is_there_if_it_is_asked_for(here):
    lines = ['{"text": "a"}'] * FIRST_ROWS + ['{"text": "b", "late": 1}']
    Path("a.jsonl").write_text("\n".join(lines))
    assert opened("a.jsonl").rows.columns(("late", "never")) == {"text", "late"}
    assert opened("a.jsonl").rows.columns() == {"text"}


def test_parquet_and_arrow_with_columns_that_are_not_needed(here):
    broken = pa.array([b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    first = pa.table({"text": ["one", "2024-05-06"], "extra": pa.nulls(2), "bytes": broken})
    second = pa.table({"extra": [{"a": 1}, None], "text": ["three", "four"], "when": [date(2024, 1, 1)] * 2})
    Path("parts").mkdir()
    for number, table in enumerate((first, second)):
        pa.parquet.write_table(table, f"parts/{number}.parquet")
    assert texts("parts") == ["one", "2024-05-06", "three", "four"]
    assert opened("parts").columns == ["text"]
    with pa.OSFile("a.arrow", "wb") as file, pa.ipc.new_file(file, first.schema) as out:
        out.write_table(first)
    assert texts("a.arrow") == ["one", "2024-05-06"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_text_that_is_no_utf8_spoils_its_row_alone(here, kind):
    table = pa.table({"text": pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())})
    if kind == "parquet":
        pa.parquet.write_table(table, "a.parquet")
    else:
        with pa.OSFile("a.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    assert texts(f"a.{kind}") == ["good", "not UTF-8 text", "fine"]


def test_a_row_has_the_number_that_its_file_gives_it(here):
    """Of a line from 1; of a row from 0, on through the batches of a file."""
    datasets.Dataset.from_list(ROWS * 900).to_parquet("a.parquet", batch_size=700)
    saved("plain", 7)  # files of 4 rows and 3
    with pa.OSFile("a.arrow", "wb") as file, pa.ipc.new_file(file, pa.schema([("text", pa.string())])) as out:
        for count in (2, 3):
            out.write_table(pa.table({"text": ["a"] * count}))
    Path("a.jsonl").write_bytes(b"\n" + LINES.replace(b"\n", b"\n\n"))
    Path("a.json").write_text(json.dumps(ROWS, indent=2))  # a row takes three lines
    first, second = (f"plain/data-0000{number}-of-00002.arrow" for number in range(2))
    for path, places in {
        "a.parquet": {n: f"a.parquet, row {n}" for n in (0, 1, 699, 700, 1699, 1700, 2699)},
        "a.arrow": {n: f"a.arrow, row {n}" for n in range(5)},
        "plain": {0: f"{first}, row 0", 3: f"{first}, row 3", 4: f"{second}, row 0", 6: f"{second}, row 2"},
        "a.jsonl": {0: "a.jsonl, line 2", 1: "a.jsonl, line 4", 2: "a.jsonl, line 6"},
        "a.json": {0: "a.json, line 2", 1: "a.json, line 5", 2: "a.json, line 8"},
    }.items():
        rows = opened(path).rows
        assert len(rows) == max(places) + 1
        assert {number: rows.place(number) for number in places} == places


# Rows that cannot be read.

SETTINGS = "sample.sources=[{{name: t, path: {}, rows: text, share: 1{}}}]"
BAD = {
    '{"text": ': "not valid JSON",
    '{"text": "a\\ud800"}': "half of a surrogate pair",
    '{"text": "a\udcff"}': "not UTF-8 text",
    "[1]": "not a JSON object",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n \n"])
def test_a_bad_line_is_named_by_its_number_and_left_out_with_drop(fresh_folder, bad, between):
    good = [json.dumps({"text": tiny.text(random.Random(number), 40)}) for number in range(200)]
    lines = ["", *good[:150], bad, *good[150:]]
    Path("t.jsonl").write_bytes(between.join(lines).encode("utf-8", "surrogateescape"))
    place = f"t.jsonl, line {1 + between.count(chr(10)) * 151}"
    more = ["evaluate.reason_score=null", "sample.train_tokens=90000"]  # more than there is: every row is reached
    ran = pipeline("sample", SETTINGS.format("t.jsonl", ""), *more)
    assert ran.status == 1
    assert f"{place}: {BAD[bad]}" in ran.out
    ran = pipeline("sample", SETTINGS.format("t.jsonl", ", drop: any"), *more)
    assert ran.status == 1
    assert re.search(rf"1 of 201 rows read were dropped: 1 {BAD[bad]}[^,]* \(as {place}\)", ran.out), ran.out


# Which files.


def saved(folder: str, count: int = 3) -> list[str]:
    """A folder as `datasets.save_to_disk` leaves it, and its texts."""
    data = datasets.Dataset.from_list([{"text": f"{folder} {number}"} for number in range(count)])
    data.save_to_disk(folder, num_shards=2)
    return list(data["text"])


def test_what_is_no_data_is_passed_over(here):
    for name in (
        "data/a.jsonl",
        "data/.hidden.jsonl",
        "data/.cache/b.jsonl",
        "data/.ipynb_checkpoints/a-checkpoint.jsonl",
        "data/._a.jsonl",
        "data/dataset_info.json",
        "data/state.json",
        "data/dataset_infos.json",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(LINES if name == "data/a.jsonl" else b'{"text": "wrong"}\n')
    Path("data/README.md").write_text("about it")
    for path in ("data", "data/", "data/*", "data/**/*.json*"):
        assert texts(path) == [row["text"] for row in ROWS], path
    found = {path.name for path in opened("data").passed_over}
    assert found == {
        *(".hidden.jsonl", "b.jsonl", "a-checkpoint.jsonl", "._a.jsonl"),
        *("dataset_info.json", "state.json", "dataset_infos.json"),
    }
    assert texts("data/.hidden.jsonl") == ["wrong"]  # named, it is meant


def test_what_is_passed_over_is_said(fresh_folder):
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(Path("assets/tiny-chat.jsonl").read_bytes())
    for number in range(7):
        Path(f"data/._{number}.jsonl").write_bytes(b"\0\5\26\7")
    ran = pipeline("sample", "sample.sources.0.path=data")
    assert ran.status == 0, ran.out
    names = ", ".join(f"._{number}.jsonl" for number in range(5))
    assert f"sample.sources.0 (chat): passed over: {names} and 2 more" in ran.out
    for number in range(7):
        Path(f"data/._{number}.jsonl").write_bytes(b"other")
    assert "sample    complete" in pipeline("status", "sample.sources.0.path=data").out


def test_folders_that_datasets_saved(here):
    expected = saved("plain", 7)
    data = datasets.load_from_disk("plain")
    data.filter(lambda row: not row["text"].endswith("3"))  # leaves a file of its cache
    assert len(list(Path("plain").glob("cache-*.arrow"))) == 1
    assert texts("plain") == texts("plain/*") == texts("./plain/") == expected
    assert [path.suffix for path in opened("plain").passed_over] == [".arrow"]
    both = {name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)]) for name in ("train", "odd")}
    datasets.DatasetDict(both).save_to_disk("dict")
    for name in both:
        assert texts("dict", split=name) == [f"{name} {i}" for i in range(3)]
        assert texts(f"dict/{name}") == [f"{name} {i}" for i in range(3)]
    assert texts("dict", split="odd+train") == [f"{name} {i}" for name in ("odd", "train") for i in range(3)]
    with pytest.raises(UserError, match=r"'dict' has files of the splits odd and train; name the one to read"):
        texts("dict")


def test_what_exists_is_never_taken_for_a_hub_id(here):
    for folder in ("owner/name", "lmsys/lmsys-chat-1m"):
        Path(folder).mkdir(parents=True)
        Path(folder, "a.jsonl").write_bytes(LINES)
        assert texts(folder) == [row["text"] for row in ROWS]
    Path("owner/single").write_bytes(LINES)
    with pytest.raises(UserError, match=r"'owner/single': neither \.jsonl"):
        texts("owner/single")


def test_a_folder_with_the_form_of_a_hub_id_enters_by_content(fresh_folder):
    Path("owner/name").mkdir(parents=True)
    Path("owner/name/a.jsonl").write_bytes(Path("assets/tiny-chat.jsonl").read_bytes())
    inputs = find_inputs(load(TINY, ["sample.sources.0.path=owner/name"]), Path("runs"))
    assert inputs.sources[0].startswith("sha256:")
    with pytest.raises(UserError, match=r"did you mean 'owner/name'\?"):
        find_inputs(load(TINY, ["sample.sources.0.path=owner/nane"]), Path("runs"))


# Splits.

TRAIN_AND_TEST = [
    ("train.jsonl", "test.jsonl"),
    ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
    ("train/a.jsonl", "test/a.jsonl"),
    ("data/training/a.jsonl", "data/eval/a.jsonl"),
    ("set_train.jsonl", "set_testing.jsonl"),
    ("TRAIN.JSONL", "Test.jsonl"),
]


@pytest.mark.parametrize(("train", "test"), TRAIN_AND_TEST)
def test_a_split_of_a_folder_is_chosen_or_asked_for(here, train, test):
    for name, text in ((train, "learn"), (test, "examine")):
        Path("set", name).parent.mkdir(parents=True, exist_ok=True)
        Path("set", name).write_text(f'{{"text": "{text}"}}\n')
    for path in ("set", "set/**/*.[jJ]*"):
        assert texts(path, split="train") == ["learn"]
        assert texts(path, split="test") == ["examine"]
        assert sorted(texts(path, split="train+test")) == ["examine", "learn"]
        with pytest.raises(UserError, match=r"\.split: '.*' has files of the splits test and train; name the one"):
            texts(path)
        with pytest.raises(UserError, match=r"split: 'validation': .* has no such files; there are test, train"):
            texts(path, split="validation")
    assert texts(f"set/{test}") == ["examine"]


def test_words_within_words_are_no_splits(here):
    for name in ("trained", "latest", "contest", "evaluator", "developer"):
        Path(f"set/{name}.jsonl").parent.mkdir(exist_ok=True)
        Path(f"set/{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    assert texts("set") == ["contest", "developer", "evaluator", "latest", "trained"]
    with pytest.raises(UserError, match="the files are of no split; leave it out"):
        texts("set", split="train")


@pytest.mark.parametrize(("setting", "value"), [("subset", "main"), ("revision", "0" * 40)])
@pytest.mark.parametrize("path", ["a.jsonl", "folder", "*.jsonl"])
def test_what_is_for_the_hub_is_refused_for_files(here, setting, value, path):
    Path("folder").mkdir()
    for name in ("a.jsonl", "folder/a.jsonl"):
        Path(name).write_bytes(LINES)
    with pytest.raises(UserError, match=rf"{setting}: '{value}': is for data sets of the hub, .*{setting}=null"):
        texts(path, **{setting: value})


def test_kinds_side_by_side_are_refused(here):
    Path("set").mkdir()
    Path("set/a.jsonl").write_bytes(LINES)
    datasets.Dataset.from_list(ROWS).to_parquet("set/b.parquet")
    with pytest.raises(UserError, match=r"files side by side \(a\.jsonl and b\.parquet\)"):
        texts("set")


def test_a_saved_data_set_that_lost_a_file(here):
    datasets.Dataset.from_list(ROWS * 4).save_to_disk(here / "saved", num_shards=4)
    assert len(texts("saved")) == 12
    (here / "saved" / "data-00001-of-00004.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00001-of-00004\.arrow, which is not there"):
        opened("saved")


def test_folders_behind_links_are_read_once(here):
    for folder in ("data", "elsewhere"):
        (here / folder).mkdir()
        (here / folder / f"{folder}.jsonl").write_bytes(LINES)
    (here / "data" / "more").symlink_to(here / "elsewhere")
    (here / "data" / "round").symlink_to(here / "data")
    assert len(texts("data")) == 2 * len(ROWS)


def test_results_of_ours_beside_the_text_are_no_text(here):
    (here / "a.jsonl").write_bytes(LINES)
    (here / "runs" / "sample").mkdir(parents=True)
    (here / "runs" / ".inputs.json").write_text("{}")
    (here / "runs" / "sample" / "begun.json").write_text("{}")
    assert len(texts(".")) == len(ROWS)


def test_files_of_a_test_split_beside_others_are_asked_about(here):
    (here / "test").mkdir()
    for name in ("data.jsonl", "test/x.jsonl"):
        (here / name).write_bytes(LINES)
    with pytest.raises(UserError, match=r"files of the split test beside others \(data\.jsonl\)"):
        opened(here)
    assert len(texts(here, split="test")) == len(ROWS)
    with pytest.raises(UserError, match=r"'dev'.* has no such files; there are test"):
        opened(here, split="dev")


def test_a_bad_first_line_that_begins_as_a_list_does(here):
    for line in (b"[broken\n", b"[1, 2]\n"):
        (here / "a.jsonl").write_bytes(line + LINES)
        assert len(texts("a.jsonl", drop="any")) == 1 + len(ROWS)
    for rows in (b'[\n{"text": "a"}\n]', b'[{"text": "a"},\n{"text": "b"}\n]', b'["a",\n"b"]', b'[\n\n{"text": "a"}]'):
        (here / "a.json").write_bytes(rows)
        assert texts("a.json")[0] == "a"
