"""Rows of a source by number, whatever holds them: JSON files, tables of arrow and parquet, a data set of the hub.

JSON: a file is read once to find where each row begins and ends, 16 bytes of memory a row, and each row is parsed when
it is taken: a column that is not asked for may hold anything, and a row that cannot be read harms no other. A file that
is not of lines is in memory as text for that first look.

Arrow: files that `datasets` saved, and its data sets of the hub, are mapped as they are. Parquet cannot be read row by
row: the needed columns are unpacked, one row group after another, into a nameless file in the scratch folder.
"""

import json
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from harvest.files import BLOCK, UserError
from harvest.opened_file import Bytes, OpenedFile, Unpacked

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
BOM = b"\xef\xbb\xbf"
# A row of an array is an object or a text; [1, 2] is a line that is no row.
ARRAY = re.compile(r"\s*\[\s*([\[{\"\]]|$)")
FIRST_ROWS = 100  # of a file, that say which columns it has
SHORTEST_ROW = 8  # {"a":1} and a line feed; what is shorter may be blank
LONGEST_FIRST_LINE = 64 << 20
UNPACKED_ROWS = 1000  # of a batch


class Damaged(NamedTuple):
    """A row that cannot be read, and why."""

    reason: str


Row = dict[str, Any] | Damaged


class Rows:
    """Rows of blocks, one after another, and the `files` that they are read from."""

    def __init__(self, blocks: Iterable["Block"], files: Sequence[OpenedFile] = ()) -> None:
        self.files, self._blocks = files, [block for block in blocks if len(block)]
        self._ends = np.cumsum([len(block) for block in self._blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def columns(self, wanted: Iterable[str] = ()) -> set[str]:
        """Names of the columns, as far as the first rows tell; `wanted` ones are looked for in all rows."""
        names = set().union(*(block.columns() for block in self._blocks))
        return names | {name for name in wanted if name not in names and any(b.has(name) for b in self._blocks)}

    def take(self, numbers: Iterable[int], columns: Sequence[str]) -> list[Row]:
        """Rows by number, with these columns alone."""
        return [block.row(at, columns) for block, at in map(self._at, numbers)]

    def place(self, number: int) -> str:
        """File, and line or row."""
        block, at = self._at(number)
        return block.place(at)

    def _at(self, number: int) -> tuple["Block", int]:
        index = int(np.searchsorted(self._ends, number, "right"))
        return self._blocks[index], number - (int(self._ends[index]) - len(self._blocks[index]))


class _JsonRows:
    """Rows of a file, at `spans` of its bytes, int64 (rows, 2)."""

    def __init__(self, path: Path, data: Bytes, spans: np.ndarray) -> None:
        self._path, self._data, self._spans = path, data, spans

    def __len__(self) -> int:
        return len(self._spans)

    def columns(self) -> set[str]:
        rows = map(self._whole_row, range(min(FIRST_ROWS, len(self))))
        return {name for row in rows if isinstance(row, dict) for name in row}

    def has(self, name: str) -> bool:
        return any(isinstance(row, dict) and name in row for row in map(self._whole_row, range(len(self))))

    def row(self, number: int, columns: Sequence[str]) -> Row:
        row = self._whole_row(number)
        return row if isinstance(row, Damaged) else {name: row.get(name) for name in columns}

    def place(self, number: int) -> str:
        start = int(self._spans[number, 0])
        pieces = (self._data.read(at, min(BLOCK, start - at)) for at in range(0, start, BLOCK))
        return f"{self._path}, line {1 + sum(piece.count(10) for piece in pieces)}"

    def _whole_row(self, number: int) -> Row:
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


def open_json(file: OpenedFile, scratch: Path | None) -> _JsonRows:
    """The rows of a JSON file, compressed or not: lines, an array, or values one after another.

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
    return _JsonRows(file.path, data, _line_spans(data, start) if spans is None else spans)


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
    begins = [_leading_value(line.strip()) for line in lines]
    is_lines = any(isinstance(value, dict | str) and not rest for value, rest in begins)
    return start, is_lines and begins[0][1][:1] != "{", False


def _leading_value(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, None if there is none, and what follows it."""
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
    """The elements of an array, or values one after another; None if there are none but damaged lines."""
    text, decoder = data[start:].decode("utf-8", "surrogateescape"), json.JSONDecoder()
    at, done, place = text.index("[") + 1 if is_array else 0, 0, start  # of characters, and a place in bytes
    spans, between = [], re.compile(r"[\s,]*")
    try:
        while (at := between.match(text, at).end()) < len(text):  # pyright: ignore[reportOptionalMemberAccess]
            if is_array and text[at] == "]":
                break
            end = decoder.raw_decode(text, at)[1]
            begin = place + len(text[done:at].encode("utf-8", "surrogateescape"))
            place = begin + len(text[at:end].encode("utf-8", "surrogateescape"))
            spans.append((begin, place))
            done = at = end
        if is_array and at == len(text):
            raise ValueError("the array does not end")
    except (ValueError, RecursionError) as error:
        if not is_array:
            return None
        raise UserError(f"{path}: cannot be read as JSON: {error}; it is damaged or half copied") from None
    return np.array(spans, np.int64).reshape(-1, 2)


class _Batch:
    """Rows of a record batch from the `first` of a file on, whose columns are `names`; the batch may hold fewer."""

    def __init__(self, place: str, first: int, batch: Any, names: Sequence[str]) -> None:
        self._place, self._first, self._batch, self._names = place, first, batch, names
        self._of = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}

    def __len__(self) -> int:
        return self._batch.num_rows

    def columns(self) -> set[str]:
        return set(self._names)

    def has(self, name: str) -> bool:
        return name in self._names

    def row(self, number: int, columns: Sequence[str]) -> Row:
        try:
            return {name: self._of[name][number].as_py() if name in self._of else None for name in columns}
        except UnicodeDecodeError:
            return Damaged("not UTF-8 text")

    def place(self, number: int) -> str:
        return f"{self._place}row {self._first + number}"


Block = _JsonRows | _Batch


def batches(found: Iterable[Any], names: Sequence[str], path: Path | None = None) -> Iterator[_Batch]:
    """Record batches as blocks of rows, of a file at `path`."""
    first = 0
    for batch in found:
        yield _Batch(f"{path}, " if path else "", first, batch, names)
        first += batch.num_rows


def open_arrow(file: OpenedFile) -> list[_Batch]:
    """The rows of an arrow file, mapped.

    Raises UserError that names the file if it cannot be read.
    """
    import pyarrow as pa

    file.hash()
    with _named_errors(file, "arrow"):
        mapped = pa.memory_map(file.open_path)
        if file.read(0, min(6, mapped.size())) == b"ARROW1":
            reader: Any = pa.ipc.open_file(mapped)
            found = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            reader = pa.ipc.open_stream(mapped)
            found = list(reader)
        for batch in found:
            try:
                batch.validate(full=True)  # offsets that lead out of the file would crash
            except pa.ArrowInvalid as error:
                if "UTF8" not in str(error):  # which is found row by row
                    raise
        return list(batches(found, reader.schema.names, file.path))


def parquet_columns(file: OpenedFile) -> dict[str, int]:
    """The columns of a parquet file, and what each takes at least once it is unpacked, in bytes.

    Raises UserError that names the file if it cannot be read.
    """
    import pyarrow.parquet as pq

    with _named_errors(file, "parquet"), file.stream() as stream:
        parquet = pq.ParquetFile(stream)
        found = dict.fromkeys(parquet.schema_arrow.names, 0)
        for group in map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                if (name := chunk.path_in_schema.split(".")[0]) in found:
                    found[name] += chunk.total_uncompressed_size
        return found


def open_parquet(file: OpenedFile, columns: Sequence[str], scratch: Path | None) -> list[_Batch]:
    """The rows of a parquet file, with these columns alone.

    Raises UserError that names the file if it cannot be read, ChangedError if it changes meanwhile.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.hash()
    unpacked, out = Unpacked(scratch), None
    with _named_errors(file, "parquet"), file.stream() as stream:
        parquet = pq.ParquetFile(stream)
        names = parquet.schema_arrow.names
        here = [name for name in columns if name in names]
        for group in range(parquet.num_row_groups):  # over all of them at once, memory grows with the file
            for batch in parquet.iter_batches(UNPACKED_ROWS, row_groups=[group], columns=here):
                out = out or pa.ipc.new_stream(unpacked.file, batch.schema)
                out.write_batch(batch)
    if out is None:
        return []
    out.close()
    file.check()
    unpacked.file.flush()
    return list(batches(pa.ipc.open_stream(pa.memory_map(unpacked.open_path)), names, file.path))


@contextmanager
def _named_errors(file: OpenedFile, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{file.path}: cannot be read as {kind}: {first}") from None
