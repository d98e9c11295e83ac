"""The packed contexts of a sample, as the stages after it read them: Zarr arrays whose every chunk is vouched for.

A chunk ends with its crc32c. `checksums.json` beside the arrays has those of all chunks, so that chunks which traded
places, each whole in itself, are found.
"""

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from harvest.files import UserError, read_json, write_sealed

SPLITS: tuple[str, ...] = ("train", "holdout")
ARRAYS = ("tokens", "document", "source")
NO_STRATUM = 65_535  # in the array `stratum`, which is there where a source has strata
CHECKSUMS = "checksums.json"
CRC_BYTES = 4  # at the end of a chunk
RESAMPLE = "`python -m pipeline sample --force` makes them anew"


class Contexts:
    """What the sample stage wrote, checked when it is read: a missing chunk would read as zeros otherwise.

    Raises UserError that names the file when something is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._checksums = path, _read_checksums(path)
        try:
            self._root = zarr.open_group(str(path), mode="r")
            self.sources = [str(name) for name in cast("list[str]", self._root.attrs["sources"])]
            # Where a BOS stands, as `sample.bos`; None where nothing says so.
            self.bos = cast("str | None", self._root.attrs.get("bos"))
            # [{"source": name, "value": of its column}], empty without strata
            self.strata = cast("list[dict[str, Any]]", self._root.attrs.get("strata", []))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: no contexts there, or damaged ones ({error}); {RESAMPLE}") from None

    def count(self, split: str) -> int:
        """Number of contexts of a split."""
        return self._array(split, "source").shape[0]

    def read(self, split: str, name: str, first: int, count: int) -> np.ndarray:
        """`tokens`, `document` (count, context_size), `source` or `stratum` (count,) of contexts from `first` on."""
        array = self._array(split, name)
        step = array.chunks[0]
        for chunk in range(first // step, -(-(first + count) // step)):
            file = self.path / split / name / "c" / str(chunk) / ("0" if array.ndim > 1 else "")
            if not file.exists():
                raise UserError(f"{file}: missing; {RESAMPLE}")
            recorded = self._checksums.get(f"{split}/{name}")
            if recorded and _checksum(file) != recorded[chunk]:
                raise UserError(f"{file}: not what was written there (crc32c); {RESAMPLE}")
        try:
            return np.asarray(array[first : first + count])
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path / split / name}: damaged ({error}); {RESAMPLE}") from None

    def strata_of(self, split: str, first: int, count: int) -> np.ndarray:
        """Index into `strata` of contexts from `first` on, uint16 (count,); NO_STRATUM for those that have none."""
        if not self.strata:
            return np.full(count, NO_STRATUM, np.uint16)
        return self.read(split, "stratum", first, count)

    def _array(self, split: str, name: str) -> zarr.Array:
        try:
            return cast(zarr.Array, self._root[f"{split}/{name}"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.path / split / name}: missing or damaged ({error}); {RESAMPLE}") from None


def write_checksums(path: Path) -> None:
    """Record the checksum that stands at the end of every chunk of finished contexts."""
    found: dict[str, list[int]] = {}
    names = [f"{split}/{name}" for split in SPLITS for name in (*ARRAYS, "stratum")]
    for array in (name for name in names if (path / name).is_dir()):
        chunks = sorted((path / array / "c").iterdir(), key=lambda chunk: int(chunk.name))
        found[array] = [_checksum(chunk / "0" if chunk.is_dir() else chunk) for chunk in chunks]
    write_sealed(path.parent / CHECKSUMS, found)


def _read_checksums(path: Path) -> dict[str, list[int]]:
    """By array, in order of chunks; empty for contexts of earlier versions, whose chunks are checked by themselves."""
    file = path.parent / CHECKSUMS
    return read_json(file) if file.exists() else {}


def _checksum(chunk: Path) -> int:
    with chunk.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - CRC_BYTES))
        return int.from_bytes(file.read(), "little")
