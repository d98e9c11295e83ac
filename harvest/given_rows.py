"""Rows that the user's files hold, laid end to end in order of the files: looked through once, then read by number.

An array of activations is (rows, d_in) or (contexts, context_size, d_in). Beside it a file may hold for
each row `token_ids` (or `token_id`, `tokens`, `input_ids`), `context` and `position`; token ids may also be
in files of their own. Only headers are read here, and the columns of numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.activation_files import UNNAMED, Array, open_arrays
from harvest.config import IngestConfig
from harvest.files import UserError

TOKEN_NAMES = ("token_ids", "token_id", "tokens", "input_ids")
COLUMNS = {**dict.fromkeys(TOKEN_NAMES, "token_id"), "context": "context", "position": "position"}
LARGEST = {"token_id": 2**32 - 1, "context": 2**32 - 1, "position": 2**16 - 1}  # as the store holds them
OPEN_FILES = 64  # a mapping each; systems allow a process about a thousand
ROWS_AT_ONCE = 1 << 20  # of a column of numbers
Arrays = dict[str, Array]
Opener = Callable[[Path], Arrays]


class LaidRows:
    """One array of several files, laid end to end; the last `row_axes` axes make up a row."""

    def __init__(self, opener: Opener, paths: Sequence[Path], name: str, rows: Sequence[int], row_axes: int) -> None:
        self.paths, self._open, self._name, self._row_axes = paths, opener, name, row_axes
        self.first = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])  # row number of each file's first row

    def __len__(self) -> int:
        return int(self.first[-1])

    def place(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number there."""
        file = self._file(row)
        return self.paths[file], row - int(self.first[file])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows from `start` to `stop`, (rows, ...).

        Raises UserError for a file that cannot be read any more.
        """
        parts = []
        while start < stop:
            file, (path, row) = self._file(start), self.place(start)
            count = min(stop, int(self.first[file + 1])) - start
            array = _pick(self._open(path), self._name)
            entry = prod(array.shape[1 : len(array.shape) - self._row_axes])  # rows of one step along the first axis
            try:
                read = array.read(row // entry, -(-(row + count) // entry))
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{path}: cannot be read at row {row}: {error}") from None
            laid = read.reshape(-1, *read.shape[read.ndim - self._row_axes :])
            parts.append(laid[row % entry : row % entry + count])
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """A column's numbers from `start` to `stop`, int64 (rows,)."""
        return self.read(start, stop).to(torch.int64).numpy()

    def slices(self) -> Iterator[np.ndarray]:
        """All numbers of a column, int64 (rows,), some at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield self.numbers(start, min(len(self), start + ROWS_AT_ONCE))

    def _file(self, row: int) -> int:
        return int(np.searchsorted(self.first, row, side="right")) - 1


class GivenRows(NamedTuple):
    """What the files hold."""

    acts: dict[str, LaidRows]  # by hook
    d_in: int
    columns: dict[str, LaidRows]  # those of token_id, context, position that the files hold
    bounds: np.ndarray  # int64: where each context (or block of rows) begins, and the end
    numbers: np.ndarray  # of the contexts: their running number, or what a column `context` says
    context_size: int | None  # where all contexts are of one size
    contexts_known: bool

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.bounds[-1])

    @property
    def absent(self) -> list[str]:
        """What the rows do not say of themselves."""
        known = {*self.columns, *(("context", "position") if self.contexts_known else ())}
        return [name for name in LARGEST if name not in known]


def _pick(arrays: Arrays, name: str) -> Array:
    """The array of a name, or the only one that a file holds, whatever its name; KeyError if there is neither."""
    lone = [other for other in arrays if other not in COLUMNS]
    return arrays[name if name in arrays or len(lone) != 1 else lone[0]]


def look_through(config: IngestConfig, files: Sequence[Path], token_files: Sequence[Path]) -> GivenRows:
    """Read every header and check that the files fit together.

    Raises UserError that names the file: arrays of other names, widths or types, or of no rows; columns
    that do not fit the rows or the store.
    """
    opener: Opener = lru_cache(OPEN_FILES)(open_arrays)
    hooks, names = _names(config, files[0], opener(files[0]))
    shapes = [_shape(path, opener(path), hooks, names) for path in files]
    for path, shape in zip(files, shapes, strict=True):
        if (len(shape), shape[-1]) != (len(shapes[0]), shapes[0][-1]):
            raise UserError(f"{path}: of shape {shape}; {files[0]} is of {shapes[0]}, and all need one width and form")
    lengths = [prod(shape[:-1]) for shape in shapes]
    acts = {hook: LaidRows(opener, files, hook, lengths, row_axes=1) for hook in hooks}
    columns = {COLUMNS[name]: LaidRows(opener, files, name, lengths, row_axes=0) for name in names}
    if token_files:
        if "token_id" in columns:
            raise UserError(f"ingest.token_ids: {config.token_ids!r}: {files[0]} holds token ids itself; leave one out")
        columns["token_id"] = _token_column(config, token_files, opener, sum(lengths))
    for name, column in columns.items():
        _check_numbers(name, column)
    bounds, numbers = _bounds(config, files, shapes, columns)
    sizes = np.unique(np.diff(bounds))
    if sizes[-1] > LARGEST["position"] + 1 and "position" not in columns:
        raise UserError(f"ingest.path: {config.path!r}: a context of {sizes[-1]:,} rows; the store counts to 65,536")
    known = len(shapes[0]) == 3 or config.context_size is not None or config.file_is_context or "context" in columns
    size = int(sizes[0]) if known and len(sizes) == 1 else None
    return GivenRows(acts, shapes[0][-1], columns, bounds, numbers, size, known)


def _names(config: IngestConfig, path: Path, arrays: Arrays) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hooks, and the columns' names, from the first file."""
    columns = tuple(name for name in arrays if name in COLUMNS)
    if len({COLUMNS[name] for name in columns}) < len(columns):
        raise UserError(f"{path}: holds token ids twice ({', '.join(columns)}); keep one")
    others = tuple(name for name in arrays if name not in COLUMNS)
    if not others:
        there = f", but {', '.join(map(repr, columns))}" if columns else ""
        raise UserError(f"{path}: holds no array of activations{there}; ingest.path takes the activations")
    return config.hooks or tuple(name if name != UNNAMED else "activations" for name in others), columns


def _shape(path: Path, arrays: Arrays, hooks: tuple[str, ...], columns: tuple[str, ...]) -> tuple[int, ...]:
    """The one shape of a file's activations, all checked."""
    shape: tuple[int, ...] = ()
    for hook in hooks:
        try:
            array = _pick(arrays, hook) if len(hooks) == 1 else arrays[hook]
        except KeyError:
            raise UserError(
                f"{path}: no array {hook!r} there, only {', '.join(map(repr, arrays))}; ingest.hooks names what to take"
            ) from None
        if not array.is_float:
            raise UserError(
                f"{path}: {hook!r} is {_type(array)}; float32, float16 or bfloat16 is needed (ingest.hooks names the "
                "arrays to take, ingest.token_ids files of token ids)"
            )
        if len(array.shape) not in (2, 3) or 0 in array.shape:
            raise UserError(
                f"{path}: {hook!r} is of shape {array.shape}; (rows, d_in) or (contexts, context_size, d_in) is "
                "needed, and none of them 0"
            )
        if shape and array.shape != shape:
            raise UserError(f"{path}: {hook!r} is of shape {array.shape}, {hooks[0]!r} of {shape}; they must be equal")
        shape = array.shape
    found = tuple(name for name in arrays if name in COLUMNS)
    if sorted(found) != sorted(columns):
        raise UserError(f"{path}: holds the columns {found or 'none'}, the first file {columns or 'none'}")
    for name in columns:
        _check_column(path, name, arrays[name], shape[:-1])
    return shape


def _type(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def _check_column(path: Path, name: str, array: Array, wanted: tuple[int, ...]) -> None:
    if not array.is_integer:
        raise UserError(f"{path}: {name!r} is {_type(array)}; whole numbers are needed")
    if array.shape not in (wanted, (prod(wanted),)):
        raise UserError(f"{path}: {name!r} is of shape {array.shape}; {wanted} expected, a number for each row")


def _token_column(config: IngestConfig, paths: Sequence[Path], opener: Opener, rows: int) -> LaidRows:
    name = next((name for name in opener(paths[0]) if name in TOKEN_NAMES), UNNAMED)
    lengths = []
    for path in paths:
        try:
            array = _pick(opener(path), name)
        except KeyError:
            there = ", ".join(opener(path)) or "none"
            raise UserError(f"{path}: no one array of token ids there, but {there}") from None
        _check_column(path, name or "the array", array, array.shape if len(array.shape) in (1, 2) else ())
        lengths.append(prod(array.shape))
    if sum(lengths) != rows:
        raise UserError(
            f"ingest.token_ids: {config.token_ids!r}: {sum(lengths):,} token ids; the activations have {rows:,} rows"
        )
    return LaidRows(opener, paths, name, lengths, row_axes=0)


def _check_numbers(name: str, column: LaidRows) -> None:
    start = 0
    for numbers in column.slices():
        bad = np.flatnonzero((numbers < 0) | (numbers > LARGEST[name]))
        if len(bad):
            path, row = column.place(start + int(bad[0]))
            raise UserError(
                f"{path}: {name} {numbers[bad[0]]} at row {row}; the store holds 0 to {LARGEST[name]:,} (pad with "
                "a token id and leave it out with train.exclude.token_ids)"
            )
        start += len(numbers)


def _bounds(
    config: IngestConfig, files: Sequence[Path], shapes: Sequence[tuple[int, ...]], columns: dict[str, LaidRows]
) -> tuple[np.ndarray, np.ndarray]:
    """Where contexts begin, and their numbers. Blocks of `chunk_rows` are taken where contexts are unknown."""
    given = "context_size" if config.context_size else "file_is_context" if config.file_is_context else None
    if given and (len(shapes[0]) == 3 or "context" in columns):
        says = "(contexts, context_size, d_in)" if len(shapes[0]) == 3 else "with a column `context`"
        raise UserError(f"ingest.{given}: the input is {says}, which says itself what a context is; leave it out")
    if "context" in columns:
        starts, values, before, start = [], [], -1, 0
        for numbers in columns["context"].slices():
            changes = np.flatnonzero(np.diff(numbers, prepend=before))
            starts.append(start + changes)
            values.append(numbers[changes])
            before, start = numbers[-1], start + len(numbers)
        return np.concatenate([*starts, [start]]), np.concatenate(values)
    parts, first = [], 0
    for path, shape in zip(files, shapes, strict=True):
        rows = prod(shape[:-1])
        size = rows if config.file_is_context else config.context_size or config.chunk_rows
        size = shape[1] if len(shape) == 3 else size
        if config.context_size and rows % size:
            raise UserError(f"ingest.context_size: {size}: {path} has {rows:,} rows, not whole contexts")
        parts.append(np.arange(first, first + rows, size, dtype=np.int64))
        first += rows
    bounds = np.concatenate([*parts, [first]])
    return bounds, np.arange(len(bounds) - 1)
