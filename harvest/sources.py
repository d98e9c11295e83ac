"""Where text comes from: files of JSON, parquet and arrow, or data sets of the hub, opened by `datasets`.

And where activations are that need no harvest: files of arrays, or a folder that `datasets` saved.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harvest.config import IngestConfig, Source
from harvest.conversations import COLUMNS, needed_columns
from harvest.files import UserError
from harvest.hub import hub_answers
from harvest.opened_file import OpenedFile, content_name
from harvest.rows import Block, Damaged, Rows, batches, open_arrow, open_json, open_parquet, parquet_columns
from harvest.source_files import COMPRESSIONS, find_files, is_local, kind_of

ARRAY_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")
SLOW_BYTES = 10 << 30  # reading more is told
UNPACKED = 2  # times its size that compressed JSON has at least
MOST_STRATA = 255
FIRST_ROWS, SHOWN_VALUES, SHOWN_CHARACTERS = 100, 5, 40  # of values that a message shows


class OpenedSource(NamedTuple):
    """The rows of a source, and what of them is read."""

    rows: Rows
    columns: list[str]
    content: str | None  # as a fingerprint names it; None for data sets of the hub, which have a commit
    passed_over: Sequence[Path] = ()


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub cannot be reached or refuses, its HTTP library's own errors too."""
    # httpx or httpx2, by the version of huggingface_hub; no connection is an error of theirs, not an OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError, OSError, ValueError, RuntimeError


def open_source(source: Source, commit: str | None, offline: bool, scratch: Path | None = None) -> OpenedSource:
    """All rows of a source. `commit` pins a hub data set; local files are unpacked in `scratch` if need be.

    Raises UserError that names the setting when the data cannot be had or read, or lacks a column.
    """
    where = f"sample.sources ({source.name})"
    named = (*COLUMNS[source.rows], *_chosen_by(source))
    return open_rows(source, where, named, partial(_columns, source, where=where), commit, offline, scratch)


def open_rows(
    source: Source,
    where: str,
    named: Sequence[str],
    needed: Callable[[set[str]], list[str]],
    commit: str | None,
    offline: bool,
    scratch: Path | None = None,
) -> OpenedSource:
    """As `open_source`, for any reader: with those columns that it says are `needed` of all that there are.

    `named` are looked for in all rows; `where` is the source's place in the settings. Raises UserError, as it does.
    """
    if not is_local(source.path):
        rows = _open_hub(source, where, commit, offline)
        return OpenedSource(rows, needed(rows.columns()), None)
    found = find_files(source, where)
    files = [OpenedFile(path) for path in found.files]
    if (size := sum(path.stat().st_size for path in found.files)) > SLOW_BYTES:
        print(f"{where}: {size / 1e9:,.0f} GB are read to find the rows", flush=True)
    kind = kind_of(found.files[0])
    columns: list[str] = []
    blocks: list[Block] = []
    if kind == "parquet":
        columns = needed({name for file in files for name in parquet_columns(file)})
    for file in files:
        if kind == "parquet":
            blocks += open_parquet(file, columns, scratch)
        elif kind == "arrow":
            blocks += open_arrow(file)
        else:
            blocks.append(open_json(file, scratch))
    rows = Rows(blocks, files)
    if not len(rows):
        raise UserError(f"{where}.path: {source.path!r}: holds no row")
    if not columns:
        names = rows.columns(named)
        if not names and isinstance(first := rows.take([0], ())[0], Damaged):
            raise UserError(f"{where}.path: {source.path!r}: no row can be read: {rows.place(0)}: {first.reason}")
        columns = needed(names)
    content = content_name((path.name, file.sha256) for path, file in zip(found.files, files, strict=True))
    return OpenedSource(rows, columns, content, found.passed_over)


class Choice:
    """Which rows of a source are taken (`where`), and into which of its `strata`, sorted values of a column, they fall.

    Raises UserError where the column has no values, or too many; `setting` is the source's place in the settings.
    """

    def __init__(self, source: Source, rows: Rows, setting: str) -> None:
        self._source, self._rows, self._setting = source, rows, setting
        where = (source.where or {}).items()
        self._wanted = {name: set(map(_key, each if isinstance(each, tuple) else (each,))) for name, each in where}
        self.strata: list[Any] = self._found() if source.strata else []
        self._number = {_key(value): number for number, value in enumerate(self.strata)}

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a row's values are among the wanted ones."""
        return all(_key(row[column]) in wanted for column, wanted in self._wanted.items())

    def stratum(self, row: dict[str, Any]) -> int | None:
        """Number of the stratum that a row falls into, 0 where there are none; None for a row without a value."""
        return self._number.get(_key(row[self._source.strata])) if self._source.strata else 0

    def none_taken(self) -> UserError:
        """What to say where no row has the values of `where`: those that the first rows have."""
        some = self._rows.take(range(min(FIRST_ROWS, len(self._rows))), [*self._wanted])
        rows = [row for row in some if isinstance(row, dict)]
        seen = {name: dict.fromkeys(repr(row[name])[:SHOWN_CHARACTERS] for row in rows) for name in self._wanted}
        there = "; ".join(f"{name} is {', '.join([*values][:SHOWN_VALUES])}" for name, values in seen.items())
        return UserError(
            f"{self._setting}.where: none of the {len(self._rows):,} rows has these values; in the first rows {there}"
        )

    def _found(self) -> list[Any]:
        column, found, taken = str(self._source.strata), {}, 0
        for number in range(len(self._rows)):
            (row,) = self._rows.take([number], [column, *self._wanted])
            if isinstance(row, Damaged) or not self.takes(row):
                continue
            taken += 1
            if (key := _key(row[column])) != _NONE:
                found.setdefault(key, row[column])
            if len(found) > MOST_STRATA:
                some = ", ".join(repr(value) for value in list(found.values())[:3])
                raise UserError(
                    f"{self._setting}.strata: {column!r} has more than {MOST_STRATA} values ({some}, ...); name a "
                    "column of few values"
                )
        if self._wanted and not taken:
            raise self.none_taken()
        if not found:
            raise UserError(f"{self._setting}.strata: {column!r}: no row that is taken has a value there")
        return [found[key] if key[0] != "text" else key[1] for key in sorted(found)]


_NONE = ("none", "")


def _key(value: Any) -> tuple[str, Any]:
    """By what values are equal: text by its letters, numbers by size, whatever their type; dates are text."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int | float):
        return ("number", value) if value == value else _NONE  # NaN
    return _NONE if value is None or isinstance(value, list | dict) else ("text", str(value))


def unpacked_bytes(sources: Iterable[Source]) -> int:
    """What unpacked files of some sources take at least in the scratch folder: columns of parquet, compressed JSON.

    Raises UserError where there are no files, or unreadable ones.
    """
    total = 0
    for source in sources:
        columns = {*COLUMNS[source.rows], "system", *_chosen_by(source)}
        for path in find_files(source, f"sample.sources ({source.name})").files if is_local(source.path) else ():
            if kind_of(path) == "parquet":
                total += sum(size for name, size in parquet_columns(OpenedFile(path)).items() if name in columns)
            elif path.suffix.lower() in COMPRESSIONS:
                total += UNPACKED * path.stat().st_size
    return total


def _chosen_by(source: Source) -> list[str]:
    """The columns that settings of a source name."""
    return [*(source.where or ()), *([source.strata] if source.strata else [])]


def _columns(source: Source, names: set[str], where: str) -> list[str]:
    """The columns that a source needs, of those that there are."""
    for name in _chosen_by(source):
        if name not in names:
            setting = "strata" if name == source.strata else "where"
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names))}"
            raise UserError(f"{where}.{setting}: {name!r}: the data set has no such column; {hint}")
    return needed_columns(source.rows, names, _chosen_by(source), source.name)


def _open_hub(source: Source, where: str, commit: str | None, offline: bool) -> Rows:
    import datasets
    from datasets import config as datasets_config
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    if offline or not hub_answers():
        datasets_config.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(source.path, name=source.subset, revision=commit, split=source.split)
    except DatasetNotFoundError as error:
        reason = f"not on the hub at this revision, or private: {_first_line(error)}"
        if "gated" in str(error).lower():
            reason = (
                f"a gated data set: accept its terms at https://huggingface.co/datasets/{source.path}, then "
                "`hf auth login` or set HF_TOKEN"
            )
    except (ConnectionError, TimeoutError):
        setting = f"{where.partition('.')[0]}.runtime.offline is set" if offline else "the hub does not answer"
        reason = (
            f"not in the local cache, and {setting}; go online once, or point at local .jsonl or .parquet files of the "
            "same columns"
        )
    except (DatasetGenerationError, FileNotFoundError, RuntimeError, ValueError) as error:
        reason = f"cannot be read: {_first_line(error.__cause__ or error)}"
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the disk's
            raise
        # The hub's client raises what its HTTP library does, which is none of Python's own errors.
        reason = (
            f"the hub failed to give it ({type(error).__name__}: {_first_line(error)}); the same command again goes on "
            "with what was fetched"
        )
    else:
        table: Any = data.with_format("arrow")[:]
        return Rows(batches(table.to_batches(), table.column_names))
    raise UserError(f"{where}.path: {source.path!r}: {reason}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def ingest_files(config: IngestConfig) -> tuple[list[Path], list[Path]]:
    """Files (or a folder of `datasets`) of activations, and those of token ids, in order of their names.

    Raises UserError when there are none.
    """
    token_ids = _array_files("ingest.token_ids", config.token_ids) if config.token_ids else []
    inside = {path.resolve() for path in token_ids}
    activations = [path for path in _array_files("ingest.path", config.path) if path.resolve() not in inside]
    if not activations:
        raise UserError(f"ingest.path: {config.path!r}: holds nothing but the files of ingest.token_ids")
    return activations, token_ids


def files_within(path: Path) -> list[Path]:
    """The file itself; of a folder of `datasets`, the files that hold it."""
    return [path] if path.is_file() else sorted([*path.glob("*.arrow"), *path.glob("*.json")])


def _array_files(setting: str, name: str) -> list[Path]:
    root = Path(name)
    if not root.exists():
        raise UserError(f"{setting}: {name!r}: no such file or folder")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return [root]
    found = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.is_file())
    arrays = [path for path in found if path.suffix in ARRAY_SUFFIXES]
    if not arrays:
        inner = " (a folder of several data sets: name one of them)" if (root / "dataset_dict.json").exists() else ""
        raise UserError(f"{setting}: {name!r}: no {', '.join(ARRAY_SUFFIXES)} file, and no saved data set{inner}")
    return arrays
