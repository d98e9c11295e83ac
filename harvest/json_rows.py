"""Rows of JSON files, by number: JSON Lines, an array, or an object that holds the rows, compressed or not.

A file is read once to find where each row begins and ends, 16 bytes of memory a row, and each row is parsed when it is
taken: a column that is not asked for may hold anything, and a row that cannot be read harms no other.
"""

import json
import lzma
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from harvest.files import BLOCK, UserError
from harvest.opened_file import OpenedFile
from harvest.rows import Damaged, Row, Unpacked

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
BOM = b"\xef\xbb\xbf"
TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)  # a lone quote: a text that goes on
FIRST_ROWS = 100  # of a file, that say which columns it has
SHORTEST_ROW = 8  # {"a":1} and a line feed; what is shorter may be blank
LONGEST_FIRST_LINE = 64 << 20


class Spans(NamedTuple):
    """Where rows begin and end in a file, int64 (rows,) each."""

    starts: np.ndarray
    ends: np.ndarray


class JsonRows:
    """JSON values of a file."""

    def __init__(self, path: Path, data: OpenedFile | Unpacked, spans: Spans, has_lines: bool) -> None:
        self.path, self._data, self._spans, self._has_lines = path, data, spans, has_lines

    def __len__(self) -> int:
        return len(self._spans.starts)

    def column_names(self) -> set[str]:
        """Columns of the first rows."""
        rows = [self.row(number) for number in range(min(FIRST_ROWS, len(self)))]
        return {name for row in rows if isinstance(row, dict) for name in row}

    def has_column(self, name: str) -> bool:
        """Whether any row has a column; reads all of them where none has."""
        rows = (self.row(number) for number in range(len(self)))
        return any(isinstance(row, dict) and name in row for row in rows)

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> list[Row]:
        """Rows by number."""
        rows = (self.row(number) for number in numbers)
        return [row if isinstance(row, Damaged) else {name: row.get(name) for name in columns} for row in rows]

    def place(self, number: int) -> str:
        """File and line."""
        if not self._has_lines:
            return f"{self.path}, row {number}"
        start, at, line = int(self._spans.starts[number]), 0, 1
        while at < start:
            block = self._data.read(at, min(BLOCK, start - at))
            at, line = at + len(block), line + block.count(b"\n")
        return f"{self.path}, line {line}"

    def row(self, number: int) -> Row:
        """A row with all of its columns."""
        start, end = int(self._spans.starts[number]), int(self._spans.ends[number])
        # Bytes that are no UTF-8 become halves of surrogate pairs: they matter only in a column that is used.
        text = self._data.read(start, end - start).decode("utf-8", "surrogateescape")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Damaged(f"not valid JSON ({str(error).partition(':')[0]})")
        if isinstance(row, str):  # a list of texts
            return {"text": row}
        return row if isinstance(row, dict) else Damaged("not a JSON object")


def open_json(file: OpenedFile, schemas: Sequence[Sequence[str]], scratch: Path | None) -> JsonRows:
    """The rows of a file. An object that holds the rows is known by the columns of one of the `schemas`.

    Raises UserError that names the file where it cannot be read, ChangedError where it changes meanwhile.
    """
    data: OpenedFile | Unpacked = file
    with file.stream() as stream:
        head = stream.read(8)
        kind = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
        if kind:
            data = Unpacked(scratch)
            _decompress(file.path, stream, kind, data)
            file.hash()
    with data.stream() as stream:
        start, form = _form(stream)
    if form == "lines":
        spans = _line_spans(data, start)
    else:
        spans = _value_spans(file.path, data.blocks(), in_array=form == "array")
    found = JsonRows(file.path, data, spans, has_lines=True)
    if form == "array" or len(found) != 1:
        return found
    whole = found.row(0)
    if isinstance(whole, Damaged) or (rows := _rows_within(whole, schemas)) is None:
        return found
    unpacked = Unpacked(scratch)
    unpacked.file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return JsonRows(file.path, unpacked, _line_spans(unpacked, 0), has_lines=False)


def _decompress(path: Path, stream: BinaryIO, kind: str, out: Unpacked) -> None:
    import pyarrow as pa

    stream.seek(0)
    try:
        # No `with`: the stream below is the caller's.
        source: Any = lzma.LZMAFile(stream) if kind == "xz" else pa.CompressedInputStream(pa.PythonFile(stream), kind)  # noqa: SIM115
        while block := source.read(BLOCK):
            out.file.write(block)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowInvalid) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"{path}: cannot be unpacked as {kind} ({error}); it is damaged or half copied") from None


def _form(stream: BinaryIO) -> tuple[int, str]:
    """Where the first value begins, and what there is: `lines`, an `array`, or `values` that go over lines or share
    one. Lines they are where one of the first two is an object: another may be damaged.
    """
    start = len(BOM) if stream.read(len(BOM)) == BOM else 0
    stream.seek(start)
    lines = [line for line in (stream.readline(LONGEST_FIRST_LINE) for _ in range(20)) if line.strip()][:2]
    for number, line in enumerate(lines):
        # A row of an array is an object or a text; [1, 2] is a line that is no row.
        if number == 0 and re.match(rb"\s*\[\s*([\[{\"\]]|$)", line):
            return start, "array"
        try:
            if isinstance(json.loads(line.decode("utf-8", "replace")), dict | str):
                return start, "lines"
        except (ValueError, RecursionError):
            if _holds_several(line):
                return start, "values"
    return start, "values" if len(lines) > 1 and lines[0].lstrip()[:1] == b"{" else "lines"


def _holds_several(line: bytes) -> bool:
    """Whether an object follows a value in a line."""
    text = line.decode("utf-8", "replace").lstrip()
    try:
        return text[json.JSONDecoder().raw_decode(text)[1] :].lstrip()[:1] == "{"
    except (ValueError, RecursionError):
        return False


def _line_spans(data: OpenedFile | Unpacked, start: int) -> Spans:
    """Lines that are not blank."""
    found, size, last = [np.zeros(0, np.int64)], 0, b"\n"
    for block in data.blocks():
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
        size, last = size + len(block), block[-1:]
    if last != b"\n":
        found.append(np.array([size]))
    ends = np.concatenate(found)
    starts = np.concatenate([[start], ends[:-1] + 1])[: len(ends)]
    filled = ends > starts
    for short in np.flatnonzero(filled & (ends - starts < SHORTEST_ROW)):
        filled[short] = bool(data.read(int(starts[short]), int(ends[short] - starts[short])).strip())
    return Spans(starts[filled], ends[filled])


def _value_spans(path: Path, blocks: Iterable[bytes], *, in_array: bool) -> Spans:
    """The elements of an array, or objects that stand one after another.

    Raises UserError where the file ends in the middle of one.
    """
    depth, start, outer = 0, 0, int(in_array)
    starts, ends = array("q"), array("q")
    for at, mark in _marks(path, blocks):
        if mark in b"[{":
            if depth == outer and not in_array:
                start = at
            depth += 1
            if in_array and depth == 1:
                start = at + 1
        elif mark in b"]}":
            depth -= 1
            if depth == 0:
                starts.append(start)
                ends.append(at if in_array else at + 1)
        elif mark == b"," and depth == outer and in_array:
            starts.append(start)
            ends.append(at)
            start = at + 1
        if depth < 0:
            raise UserError(f"{path}: cannot be read as JSON: a bracket too many at byte {at}")
    if depth:
        raise UserError(f"{path}: cannot be read as JSON: it ends in the middle of a value; it is half copied")
    spans = Spans(np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64))
    filled = spans.ends - spans.starts > 1  # nothing or a line feed, in []
    return Spans(spans.starts[filled], spans.ends[filled])


def _marks(path: Path, blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Brackets and commas outside of texts, and where they stand."""
    rest, offset = b"", 0
    for block in blocks:
        data = rest + block
        done = len(data)
        for token in TOKENS.finditer(data):
            if token[0] == b'"':  # goes on in the next block
                done = token.start()
                break
            if len(token[0]) == 1:
                yield offset + token.start(), token[0]
        rest, offset = data[done:], offset + done
    if rest:
        raise UserError(f"{path}: cannot be read as JSON: it ends in the middle of a text; it is half copied")


def _rows_within(whole: dict[str, Any], schemas: Sequence[Sequence[str]]) -> list[Any] | None:
    """The rows that an object holds under one of its names (`data`), or by column; None where it is a row itself."""
    columns = {name: column for name, value in whole.items() if (column := _column(value))}
    for schema in schemas:
        if set(schema) <= set(whole):
            lengths = {len(columns.get(name, ())) for name in schema}
            first = columns.get(schema[0], [{}])[0]
            if len(lengths) > 1 or isinstance(first, dict | int):
                return None
            same = {name: column for name, column in columns.items() if len(column) in lengths}
            return [dict(zip(same, values, strict=True)) for values in zip(*same.values(), strict=True)]
        for rows in columns.values():
            if isinstance(rows[0], dict) and set(schema) <= set(rows[0]):
                return rows
    return None


def _column(value: Any) -> list[Any] | None:
    """A column as `pandas` writes it: a list, or an object whose names are numbers."""
    if isinstance(value, dict) and "0" in value:
        return list(value.values())
    return value if isinstance(value, list) else None
