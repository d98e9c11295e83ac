"""Rows of JSON files, by number: JSON Lines, an array, or an object that holds the rows, compressed or not.

A file is read once to find where each row begins and ends, 16 bytes of memory a row, and each row is parsed when it is
taken: a column that is not asked for may hold anything, and a row that cannot be read harms no other. A file that is
not of lines is in memory as text for that first look.
"""

import json
import lzma
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harvest.files import BLOCK, UserError
from harvest.opened_file import Bytes, OpenedFile, Unpacked
from harvest.rows import Block, Damaged, Row

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
BOM = b"\xef\xbb\xbf"
# A row of an array is an object or a text; [1, 2] is a line that is no row.
ARRAY = re.compile(r"\s*\[\s*([\[{\"\]]|$)")
BETWEEN = re.compile(r"[\s,]*")
FIRST_ROWS = 100  # of a file, that say which columns it has
SHORTEST_ROW = 8  # {"a":1} and a line feed; what is shorter may be blank
LONGEST_FIRST_LINE = 64 << 20


class JsonRows(Block):
    """Rows of a file that lie at `spans` of its bytes, int64 (rows, 2)."""

    def __init__(self, path: Path, data: Bytes, spans: np.ndarray, *, has_lines: bool = True) -> None:
        self._path, self._data, self._spans, self._has_lines = path, data, spans, has_lines

    def __len__(self) -> int:
        return len(self._spans)

    def columns(self) -> set[str]:
        rows = map(self.whole_row, range(min(FIRST_ROWS, len(self))))
        return {name for row in rows if isinstance(row, dict) for name in row}

    def has(self, name: str) -> bool:
        return any(isinstance(row, dict) and name in row for row in map(self.whole_row, range(len(self))))

    def row(self, number: int, columns: Sequence[str]) -> Row:
        row = self.whole_row(number)
        return row if isinstance(row, Damaged) else {name: row.get(name) for name in columns}

    def place(self, number: int) -> str:
        if not self._has_lines:
            return f"{self._path}, row {number}"
        start = int(self._spans[number, 0])
        pieces = (self._data.read(at, min(BLOCK, start - at)) for at in range(0, start, BLOCK))
        return f"{self._path}, line {1 + sum(piece.count(10) for piece in pieces)}"

    def whole_row(self, number: int) -> Row:
        """A row with all of its columns."""
        start, end = self._spans[number].tolist()
        # Bytes that are not UTF-8 become halves of surrogate pairs: they matter only in a column that is used.
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

    Raises UserError that names the file if it cannot be read, ChangedError if it changes meanwhile.
    """
    data: Bytes = file
    with file.stream() as stream:
        head = stream.read(8)
        if kind := next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None):
            data = Unpacked(scratch)
            _decompress(file.path, stream, kind, data)
            file.hash()
    with data.stream() as stream:
        start, is_lines, is_array = _form(stream)
    spans = None if is_lines else _value_spans(file.path, b"".join(data.blocks()), start, is_array)
    found = JsonRows(file.path, data, _line_spans(data, start) if spans is None else spans)
    if is_array or len(found) != 1:
        return found
    whole = found.whole_row(0)
    if isinstance(whole, Damaged) or (rows := _rows_within(whole, schemas)) is None:
        return found
    unpacked = Unpacked(scratch)
    unpacked.file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return JsonRows(file.path, unpacked, _line_spans(unpacked, 0), has_lines=False)


def _decompress(path: Path, stream: BinaryIO, kind: str, out: Bytes) -> None:
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


def _form(stream: BinaryIO) -> tuple[int, bool, bool]:
    """Where the first value begins; whether lines are rows, as one of the first two shows; whether it is an array."""
    start = len(BOM) if stream.read(len(BOM)) == BOM else 0
    stream.seek(start)
    read = (stream.readline(LONGEST_FIRST_LINE).decode("utf-8", "replace") for _ in range(20))
    lines = [line for line in read if line.strip()][:2]
    if lines and ARRAY.match(lines[0]):
        return start, False, True
    begins = [_leading_value(line) for line in lines]
    is_lines = any(isinstance(value, dict | str) and not rest for value, rest in begins)
    return start, is_lines and begins[0][1][:1] != "{", False


def _leading_value(line: str) -> tuple[Any, str]:
    """The JSON value that a line begins with, None if there is none, and what follows it."""
    text = line.strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[end:].strip()


def _line_spans(data: Bytes, start: int) -> np.ndarray:
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
    return np.stack([starts, ends], axis=1)[filled]


def _value_spans(path: Path, data: bytes, start: int, is_array: bool) -> np.ndarray | None:
    """The elements of an array, or values one after another; None if there are none but damaged lines.

    Raises UserError for an array that ends too early.
    """
    text = data[start:].decode("utf-8", "surrogateescape")
    spans, done, place = [], 0, start  # characters and bytes up to the end of the last value
    try:
        for first, end in _values(text, is_array):
            begin = place + len(text[done:first].encode("utf-8", "surrogateescape"))
            place = begin + len(text[first:end].encode("utf-8", "surrogateescape"))
            done = end
            spans.append((begin, place))
    except (ValueError, RecursionError) as error:
        if not is_array:
            return None
        raise UserError(f"{path}: cannot be read as JSON: {error}; it is damaged or half copied") from None
    return np.array(spans, np.int64).reshape(-1, 2)


def _values(text: str, is_array: bool) -> Iterator[tuple[int, int]]:
    decoder = json.JSONDecoder()
    at = text.index("[") + 1 if is_array else 0
    while (at := BETWEEN.match(text, at).end()) < len(text):  # pyright: ignore[reportOptionalMemberAccess]
        if is_array and text[at] == "]":
            return
        end = decoder.raw_decode(text, at)[1]
        yield at, end
        at = end
    if is_array:
        raise ValueError("the array does not end")


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
