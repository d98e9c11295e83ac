"""Contexts are of the text that the manifest names, whenever it is edited and however often a sample is interrupted."""

import gzip
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import oddities
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import contents, only, pipeline

from harvest import packing, rows, sampling
from harvest.files import read_json
from harvest.opened_file import OpenedFile
from harvest.progress import Progress
from pipeline import stages

SMALL = ["evaluate.reason_score=null", "sample.train_tokens=512", "sample.holdout_tokens=256"]
KINDS = ("jsonl", "jsonl.gz", "parquet", "arrow")
SHORT = ("the", "two", "sum", "let")


def settings(path: Path, more: str = "") -> list[str]:
    return [f"sample.sources=[{{name: t, path: {path}, rows: conversation, share: 1{more}}}]", *SMALL]


def written(kind: str, rows: list[dict]) -> bytes:
    """A file of rows whose size says nothing of the words in it."""
    if kind.startswith("jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return gzip.compress(data, 0, mtime=0) if kind == "jsonl.gz" else data
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    else:
        with pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    return sink.getvalue().to_pybytes()


def edited(rows: list[dict], rng: random.Random, *, size: bool) -> list[dict]:
    """Other words in every row, as many letters of them or more."""
    of = dict(zip(SHORT, rng.sample(SHORT, len(SHORT)), strict=True))
    of = dict(zip(SHORT, (*SHORT[1:], SHORT[0]), strict=True)) if all(a == b for a, b in of.items()) else of
    more = "" if size else " check" * rng.randint(1, 3)

    def other(turn: dict) -> dict:
        return turn | {"content": " ".join(of.get(word, word) for word in turn["content"].split()) + more}

    return [row | {"conversation": [other(turn) for turn in row["conversation"]]} for row in rows]


def replaced(path: Path, data: bytes, *, mtime: bool, rename: bool = False) -> None:
    """Give a file other bytes, in place or by another file of the name, and with `mtime` its old time."""
    before = path.stat()
    with (path.with_suffix(".new") if rename else path).open("wb" if rename else "r+b") as file:
        file.write(data)
        file.truncate()
    if rename:
        path.with_suffix(".new").replace(path)
    if mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def identity(path: Path, data: bytes) -> str:
    """What a manifest holds of a file, as docs/formats.md has it, written out."""
    pairs = [[path.name, hashlib.sha256(data).hexdigest()]]
    return "sha256:" + hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def complete() -> dict[str, Path]:
    """Directories of samples by the content that their manifests name."""
    found = {
        tuple(read_json(path)["inputs"]["sources"]): path.parent for path in Path("runs").glob("*/*/manifest.json")
    }
    return {sources[0]: directory for sources, directory in found.items()}


def clean(path: Path, data: bytes, tmp_path: Path) -> dict[str, bytes]:
    """Contexts of a sample in which nothing happens, of a file of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path / f"clean-{hashlib.sha256(data).hexdigest()[:8]}"
        folder.mkdir(exist_ok=True)
        patch.chdir(folder)
        if not Path("assets").exists():
            Path("assets").symlink_to(tmp_path / "fresh" / "assets")
        Path(path.name).write_bytes(data)
        ran = pipeline("sample", *settings(Path(path.name)))
        assert ran.status == 0, ran.out
        return contents(only(folder, "runs/sample/*/contexts"))


@pytest.mark.parametrize("kind", KINDS)
def test_new_text_with_the_old_size_and_time_is_read(fresh_folder, tmp_path, kind):
    path, rows = Path(f"t.{kind}"), tiny.conversations(60)
    before = written(kind, rows)
    after = written(kind, edited(rows, random.Random(0), size=True))
    assert len(after) == len(before) and after != before
    path.write_bytes(before)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    assert pipeline("sample", *settings(path)).status == 0
    old = contents(only(fresh_folder, "runs/sample/*/contexts"))
    replaced(path, after, mtime=True)
    assert path.stat().st_mtime == 1_600_000_000
    assert "sample    complete" not in pipeline("status", *settings(path)).out
    assert pipeline("sample", *settings(path)).status == 0
    new = contents(complete()[identity(path, after)] / "contexts")
    assert new == clean(path, after, tmp_path)
    assert new != old == clean(path, before, tmp_path)
    assert len(complete()) == 2


MOMENTS = (
    "before",
    "hashed",
    "opening and back",
    "opened",
    "unpacked and back",
    "read",
    "read and back",
    "packed",
    "written",
)


class Edit:
    """What happens to a file at a moment, once."""

    def __init__(self, path: Path, data: bytes, other: bytes, *, mtime: bool, rename: bool) -> None:
        self.path, self.data, self.other, self.mtime, self.rename = path, data, other, mtime, rename
        self.left = 2

    def __call__(self, *, back: bool = False) -> None:
        if self.left == 2 - back:
            self.left -= 1
            replaced(self.path, self.data if back else self.other, mtime=self.mtime, rename=self.rename)


def hook(patch: pytest.MonkeyPatch, moment: str, edit: Edit) -> None:
    """Let the edit happen at a moment of the next sample, which is interrupted later on where all is put back."""

    def around(place: object, name: str, first: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        called = getattr(place, name)

        def calling(*arguments, **more):
            first()
            try:
                return called(*arguments, **more)
            finally:
                then()

        patch.setattr(place, name, calling)

    batches = iter(range(1000))

    def at_batch() -> None:
        number = next(batches)
        if number == 1:
            edit()
        elif number == 2 and moment == "read and back":
            edit(back=True)
            patch.setattr(packing, "SAVE_SECONDS", 0.0)

    def put_back() -> None:
        if edit.left == 1:
            edit(back=True)

    def interrupted() -> None:
        raise KeyboardInterrupt

    match moment:
        case "hashed":
            around(stages, "find_inputs", lambda: None, edit)
        case "opening and back":
            around(packing, "open_source", edit)
        case "opened":
            around(packing, "open_source", lambda: None, edit)
        case "unpacked and back":
            if edit.path.suffix == ".parquet":
                around(rows, "Unpacked", edit)
            else:
                around(OpenedFile, "stream", edit)
            for name in ("hash", "check"):
                around(OpenedFile, name, put_back)
        case "read" | "read and back":
            patch.setattr(packing, "SAVE_SECONDS", 0.0 if moment == "read" else 60.0)
            around(packing.PackedSource, "_candidates", at_batch)
        case "packed":
            around(packing.PackedSource, "_check_filled", edit)
        case "written":
            around(sampling, "write_checksums", edit)
    if "back" in moment:
        around(sampling, "_write", interrupted)


@pytest.mark.parametrize("seed", range(27))
def test_a_sample_names_the_text_that_it_read(fresh_folder, tmp_path, monkeypatch, seed):
    """Random edits that keep size, time or both: a manifest is there for no other content than was read."""
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 6)
    monkeypatch.setattr(packing, "SAVE_SECONDS", 0.0)
    rng = random.Random(seed)
    moment = MOMENTS[seed % len(MOMENTS)]
    # What is unpacked is read once; the others are read row by row.
    kind = rng.choice({"unpacked and back": KINDS[1:3], "read and back": KINDS[::3]}.get(moment, KINDS))
    size, mtime = rng.choice([(True, True), (True, False), (False, True)])
    size |= moment == "unpacked and back"  # it could not be unpacked else
    path, rows = Path(f"t.{kind}"), tiny.conversations(60, seed)
    data, other = (written(kind, each) for each in (rows, edited(rows, rng, size=size)))
    assert (len(data) == len(other)) is size and data != other
    path.write_bytes(data)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    edit = Edit(path, data, other, mtime=mtime, rename=rng.random() < 0.25 and "back" not in moment)
    texts = {identity(path, each): each for each in (data, other)}
    if moment == "before":
        assert pipeline("sample", *settings(path)).status == 0
        edit()
    with pytest.MonkeyPatch.context() as patch:
        hook(patch, moment, edit)
        first = pipeline("sample", *settings(path))
    if moment == "opening and back":
        edit(back=True)
    assert edit.left == (0 if "back" in moment else 1)
    assert (first.status == 0) is (moment == "before"), first.out
    assert "Traceback" not in first.out
    assert pipeline("sample", *settings(path)).status == 0
    assert identity(path, path.read_bytes()) in complete()
    for named, directory in complete().items():
        assert contents(directory / "contexts") == clean(path, texts[named], tmp_path), moment
    assert len(complete()) == 1 + (moment == "before")


@pytest.mark.parametrize("batch", [2, 5, 9])
def test_an_interruption_changes_neither_contexts_nor_counts(fresh_folder, monkeypatch, batch):
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 16)
    monkeypatch.setattr(packing, "SAVE_SECONDS", 0.0)
    lines = oddities.lines(900, seed=4)
    Path("odd.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8", "surrogateescape")
    change = settings(Path("odd.jsonl"), ", drop: any, where: {kind: [a, b]}")
    change += ["sample.train_tokens=6144", "sample.holdout_tokens=2048"]
    check, left = packing.PackedSource._check_dropped, [batch]

    def interrupting(self, *, all_read):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        check(self, all_read=all_read)

    monkeypatch.setattr(packing.PackedSource, "_check_dropped", interrupting)
    assert pipeline("sample", *change).status == 130
    record = read_json(only(fresh_folder, "runs/sample/*/scratch/0.json"))
    assert record["start"] == 16 * (batch - 1)
    assert pipeline("sample", *change).status == 0
    directory = only(fresh_folder, "runs/sample/*")
    resumed, summary = contents(directory / "contexts"), read_json(directory / "manifest.json")["summary"]
    shutil.rmtree("runs")
    assert pipeline("sample", *change).status == 0
    assert contents(directory / "contexts") == resumed
    assert read_json(directory / "manifest.json")["summary"] == summary
    counts = summary["t"]
    assert min(counts[f"rows_{name}"] for name in ("used", "dropped", "filtered", "not_reached", "cut")) > 0


@pytest.mark.parametrize("restored", [False, True])
def test_a_text_that_is_edited_while_a_sample_is_interrupted(fresh_folder, tmp_path, monkeypatch, restored):
    """Edited, it is another sample; put back, the one that was begun goes on, and they do not mix."""
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(packing, "SAVE_SECONDS", 0.0)
    path, rows = Path("t.jsonl"), tiny.conversations(60)
    data, other = (written("jsonl", each) for each in (rows, edited(rows, random.Random(0), size=True)))
    path.write_bytes(data)

    def interrupted() -> None:
        with pytest.MonkeyPatch.context() as patch:
            advance, left = Progress.advance, [6]

            def advancing(self, amount, note=""):
                left[0] -= self.title == "sample"
                if not left[0]:
                    raise KeyboardInterrupt
                advance(self, amount, note)

            patch.setattr(Progress, "advance", advancing)
            assert pipeline("sample", *settings(path)).status == 130

    interrupted()
    replaced(path, other, mtime=True)
    if restored:
        interrupted()
        replaced(path, data, mtime=True)
    assert pipeline("sample", *settings(path)).status == 0
    expected = data if restored else other
    assert list(complete()) == [identity(path, expected)]
    assert len(list(Path("runs/sample").iterdir())) == 2
    assert contents(complete()[identity(path, expected)] / "contexts") == clean(path, expected, tmp_path)


def test_nothing_is_left_in_the_cache_of_datasets(fresh_folder, monkeypatch):
    import datasets
    from huggingface_hub import constants

    def files() -> set[Path]:
        folders = {Path(constants.HF_HOME), Path(datasets.config.HF_DATASETS_CACHE), Path.home() / ".cache/huggingface"}
        return {path for folder in folders if folder.exists() for path in folder.rglob("*")}

    def refused(*_arguments, **_more):
        raise AssertionError("datasets reads a local file")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.setenv("TMPDIR", str(fresh_folder))
    before = files()
    for kind in KINDS:
        path = Path(f"t.{kind}")
        path.write_bytes(written(kind, tiny.conversations(60)))
        assert pipeline("sample", *settings(path)).status == 0
    assert files() == before
    assert len(list(Path("runs/sample").iterdir())) == len(KINDS)
