"""Rows of arrow tables, by number: batches in mapped memory, of which only what is read is loaded.

Files that `datasets` saved, and its data sets of the hub, are mapped as they are. Parquet cannot be read row by row:
the needed columns are unpacked, one row group after another, into a nameless file in the scratch folder.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvest.files import UserError
from harvest.opened_file import OpenedFile, Unpacked
from harvest.rows import Block, Damaged, Row

UNPACKED_ROWS = 1000  # of a batch


class Batch(Block):
    """Rows of a record batch; `names` are the columns of the file, of which the batch may hold a part."""

    def __init__(self, place: str, first: int, batch: Any, names: Sequence[str]) -> None:
        self._place, self._first, self._batch, self._names = place, first, batch, names
        self._of = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}

    def __len__(self) -> int:
        return self._batch.num_rows

    def columns(self) -> set[str]:
        return set(self._names)

    def row(self, number: int, columns: Sequence[str]) -> Row:
        try:
            return {name: self._of[name][number].as_py() if name in self._of else None for name in columns}
        except UnicodeDecodeError:
            return Damaged("not UTF-8 text")

    def place(self, number: int) -> str:
        return f"{self._place}row {self._first + number}"


def batches(found: Iterable[Any], names: Sequence[str], path: Path | None = None) -> Iterator[Batch]:
    """Record batches as blocks of rows; the rows of a `path` are counted from its beginning."""
    first = 0
    for batch in found:
        yield Batch(f"{path}, " if path else "", first, batch, names)
        first += batch.num_rows


def open_arrow(file: OpenedFile) -> list[Batch]:
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


def open_parquet(file: OpenedFile, columns: Sequence[str], scratch: Path | None) -> list[Batch]:
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
