"""Rows of arrow and parquet files, by number: batches in mapped memory, of which only what is read is loaded.

The files of a folder that `datasets` saved are mapped as they are. Parquet cannot be read row by row: the columns that
are needed are unpacked, one row group after another, into a file without a name in the scratch folder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harvest.files import UserError
from harvest.opened_file import OpenedFile
from harvest.rows import Damaged, Row, Unpacked

UNPACKED_ROWS = 1000  # of a batch


class ArrowRows:
    """Rows of batches."""

    def __init__(self, path: Path, batches: list[Any], columns: Sequence[str]) -> None:
        self.path, self._columns = path, columns
        self._batches = [batch for batch in batches if len(batch)]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def column_names(self) -> set[str]:
        """Columns of the file."""
        return set(self._columns)

    def has_column(self, name: str) -> bool:
        """Whether the file has a column."""
        return name in self._columns

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> list[Row]:
        """Rows by number."""
        return [self._row(number, columns) for number in numbers]

    def place(self, number: int) -> str:
        """File and row."""
        return f"{self.path}, row {number}"

    def _row(self, number: int, columns: Sequence[str]) -> Row:
        index = int(np.searchsorted(self._ends, number, "right"))
        batch = self._batches[index]
        at = number - (int(self._ends[index]) - len(batch))
        names = batch.schema.names
        try:
            return {name: batch.column(names.index(name))[at].as_py() if name in names else None for name in columns}
        except UnicodeDecodeError:
            return Damaged("not UTF-8 text")


def open_arrow(file: OpenedFile) -> ArrowRows:
    """The rows of an arrow file, mapped.

    Raises UserError that names the file where it cannot be read.
    """
    import pyarrow as pa

    file.hash()
    with _named_errors(file, "arrow"):
        mapped = pa.memory_map(file.open_path)
        if file.read(0, min(6, mapped.size())) == b"ARROW1":
            reader: Any = pa.ipc.open_file(mapped)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            reader = pa.ipc.open_stream(mapped)
            batches = list(reader)
        for batch in batches:
            _check(batch)
        return ArrowRows(file.path, batches, reader.schema.names)


def parquet_columns(file: OpenedFile) -> list[str]:
    """Columns of a parquet file.

    Raises UserError that names the file where it cannot be read.
    """
    import pyarrow.parquet as pq

    with _named_errors(file, "parquet"), file.stream() as stream:
        return pq.read_schema(stream).names


def parquet_bytes(file: OpenedFile, columns: Sequence[str]) -> int:
    """What these columns of a parquet file take at least once they are unpacked.

    Raises UserError that names the file where it cannot be read.
    """
    import pyarrow.parquet as pq

    with _named_errors(file, "parquet"), file.stream() as stream:
        metadata = pq.ParquetFile(stream).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def open_parquet(file: OpenedFile, columns: Sequence[str], scratch: Path | None) -> ArrowRows:
    """The rows of a parquet file, of which only these columns are there.

    Raises UserError that names the file where it cannot be read, ChangedError where it changes meanwhile.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.hash()
    names = parquet_columns(file)
    with _named_errors(file, "parquet"), file.stream() as stream:
        parquet = pq.ParquetFile(stream)
        here = [name for name in columns if name in names]
        if not here:
            rows = pa.record_batch({"": pa.nulls(parquet.metadata.num_rows)})
            return ArrowRows(file.path, [rows], names)
        unpacked, out = Unpacked(scratch), None
        for group in range(parquet.num_row_groups):  # over all of them at once, memory grows with the file
            for batch in parquet.iter_batches(UNPACKED_ROWS, row_groups=[group], columns=here):
                out = out or pa.ipc.new_stream(unpacked.file, batch.schema)
                out.write_batch(batch)
        if out:
            out.close()
    file.check()
    unpacked.file.flush()
    batches = list(pa.ipc.open_stream(pa.memory_map(unpacked.path))) if out else []
    return ArrowRows(file.path, batches, names)


def _check(batch: Any) -> None:
    """Raise ArrowInvalid for a batch whose offsets lead out of it; text that is no UTF-8 is found row by row."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


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
