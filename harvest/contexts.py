"""The packed contexts of a sample, as the stages after it read them: Zarr arrays whose every chunk is vouched for.

A chunk is its bytes and their crc32c. `checksums.json` beside the arrays has those of all chunks, so that chunks which
traded places, each whole in itself, are found.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from harvest.files import UserError, read_json, write_sealed

SPLITS: tuple[str, ...] = ("train", "holdout")
ARRAYS = ("tokens", "document", "source", "stratum")  # `stratum` is there where a source has strata
NO_STRATUM = 65_535
CHECKSUMS = "checksums.json"
CRC_BYTES = 4  # at the end of a chunk
RESAMPLE = "`python -m pipeline sample --force` makes them anew"


class _Array(NamedTuple):
    folder: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype

    def file(self, number: int) -> Path:
        """A chunk's."""
        return self.folder / "c" / f"{number}{'/0' * (len(self.shape) - 1)}"

    @property
    def file_bytes(self) -> int:
        return int(np.prod(self.chunk)) * self.dtype.itemsize + CRC_BYTES


class Contexts:
    """What the sample stage wrote, checked as it is read.

    `sources` are their names, `bos` is where a BOS is (as `sample.bos`; None where nothing says so), and `strata` are
    `{"source": name, "value": of its column}`. Raises UserError that names the file when something is missing or
    damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._checksums = path, _checksums(path.parent)
        try:
            attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
            self.sources: list[str] = [str(name) for name in attributes["sources"]]
            self.bos: str | None = attributes.get("bos")
            self.strata: list[dict[str, Any]] = attributes.get("strata", [])
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: no contexts there, or damaged ones ({error}); {RESAMPLE}") from None

    def count(self, split: str) -> int:
        """Number of contexts of a split."""
        return _array(self.path / split / "source").shape[0]

    def read(self, split: str, name: str, first: int, count: int) -> np.ndarray:
        """`tokens`, `document` (count, context_size), `source` or `stratum` (count,) of contexts from `first` on.

        Raises UserError for a chunk that is missing or damaged.
        """
        array, recorded = _array(self.path / split / name), self._checksums.get(f"{split}/{name}")
        step, stop = array.chunk[0], min(first + count, array.shape[0])
        parts = [np.zeros((0, *array.shape[1:]), array.dtype)]
        for number in range(first // step, -(-stop // step)):
            file = array.file(number)
            if not file.exists():
                raise UserError(f"{file}: missing; {RESAMPLE}")
            data = file.read_bytes()
            if len(data) != array.file_bytes or not _is_whole(data, recorded[number] if recorded else None):
                raise UserError(f"{file}: not what was written there (crc32c); {RESAMPLE}")
            parts.append(np.frombuffer(data[:-CRC_BYTES], array.dtype).reshape(array.chunk))
        skipped = first // step * step
        return np.concatenate(parts)[first - skipped : stop - skipped]

    def strata_of(self, split: str, first: int, count: int) -> np.ndarray:
        """Index into `strata` of contexts from `first` on, uint16 (count,); NO_STRATUM for those that have none."""
        if not self.strata:
            return np.full(count, NO_STRATUM, np.uint16)
        return self.read(split, "stratum", first, count)


def write_checksums(path: Path) -> None:
    """Record the checksum at the end of every chunk of finished contexts."""
    found: dict[str, list[int]] = {}
    for name in (f"{split}/{name}" for split in SPLITS for name in ARRAYS):
        if (path / name).is_dir():
            array = _array(path / name)
            files = map(array.file, range(array.shape[0] // array.chunk[0]))
            found[name] = [int.from_bytes(file.read_bytes()[-CRC_BYTES:], "little") for file in files]
    write_sealed(path.parent / CHECKSUMS, found)


def missing_chunks(directory: Path) -> list[str]:
    """Chunks of a sample's contexts that are missing or of another size, relative to its directory."""
    chunks = ((file, array.file_bytes) for array, file, _ in _recorded(directory))
    return [str(f.relative_to(directory)) for f, size in chunks if not f.is_file() or f.stat().st_size != size]


def damaged_chunks(directory: Path) -> list[str]:
    """Chunks of a sample's contexts whose bytes are not those that were written, relative to its directory."""
    chunks = ((file, recorded) for _, file, recorded in _recorded(directory))
    return [
        str(f.relative_to(directory)) for f, sum_ in chunks if not f.is_file() or not _is_whole(f.read_bytes(), sum_)
    ]


def _recorded(directory: Path) -> Iterator[tuple[_Array, Path, int]]:
    """Recorded chunks with their checksums; none where what records them is damaged, which the manifest says."""
    with suppress(UserError):
        for name, sums in _checksums(directory).items():
            array = _array(directory / "contexts" / name)
            yield from ((array, array.file(number), recorded) for number, recorded in enumerate(sums))


def _checksums(directory: Path) -> dict[str, list[int]]:
    """By array, in order of chunks; empty for contexts of earlier versions, whose chunks are checked by themselves."""
    return read_json(directory / CHECKSUMS) if (directory / CHECKSUMS).exists() else {}


def _array(folder: Path) -> _Array:
    try:
        about: Any = json.loads((folder / "zarr.json").read_bytes())
        chunk = tuple(about["chunk_grid"]["configuration"]["chunk_shape"])
        return _Array(folder, tuple(about["shape"]), chunk, np.dtype(about["data_type"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: missing or damaged ({error}); {RESAMPLE}") from None


def _is_whole(data: bytes, recorded: int | None) -> bool:
    """Whether a chunk's checksum is that of its bytes, and the recorded one."""
    found = int.from_bytes(data[-CRC_BYTES:], "little")
    return recorded in (None, found) and google_crc32c.value(data[:-CRC_BYTES]) == found
