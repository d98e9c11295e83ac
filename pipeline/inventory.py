"""What a finished stage left: the manifest lists every file that is a result, and here they are held against it.

Files that others vouch for are not listed: rows (by their shard's record), chunks of contexts (by checksums.json), and
what is no result: checkpoints, logs of trackers, files of a stream's two sides.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harvest.contexts import damaged_chunks, missing_chunks
from harvest.files import file_crc32c
from harvest.row_files import missing_rows

SMALL_BYTES = 16 << 20  # of a file that `status` reads; of a larger one it looks at the size
NO_RESULTS = ("manifest.json", "progress.json", "stream.json", "stream_done.json")
STREAMED = "store/train/shards"  # records that change as training beside the harvest reads on
RECORD = re.compile(r"store/((?:train|holdout)/shards/\d{5,}\.json)")
PASSED_OVER = {  # folders, as they are below the stage's directory
    "sample": ("scratch",),
    "harvest": ("next_epoch",),
    "train": ("*/checkpoints", "*/tensorboard"),
    "evaluate": (),
}
ROWS: dict[str, Callable[[Path], list[str]]] = {"sample": missing_chunks, "harvest": missing_rows}
CHUNKS: dict[str, Callable[[Path], list[str]]] = {"sample": damaged_chunks}  # rows have harvest/verify.py


def inventory(directory: Path, stage: str) -> dict[str, dict[str, int]]:
    """`bytes` and `crc32c` of each file that a stage left, by its path in the directory."""
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "crc32c": file_crc32c(path)}
        for path in _results(directory, stage)
    }


def changed_files(directory: Path, manifest: dict[str, Any], largest: int | None = None) -> list[str]:
    """Files that are missing or not as a stage's manifest lists them, by name.

    Of files of more than `largest` bytes only the size is looked at. Manifests of earlier versions list few files, and
    no sizes.
    """
    listed = manifest.get("files")
    entries = listed if isinstance(listed, dict) else {}
    names = [name for name in entries if not Path(name).is_absolute() and ".." not in Path(name).parts]
    if (directory / "stream.json").exists():  # training marks what it has read
        names = [name for name in names if not name.startswith(f"{STREAMED}/")]
    return [name for name in names if not _is_as_listed(directory / name, entries[name], largest)]


def missing_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What a look at a stage's files finds missing or changed: all are looked at, and the small ones read."""
    changed = changed_files(directory, manifest, SMALL_BYTES)
    look = ROWS.get(str(manifest.get("stage")))
    return changed + (look(directory) if look else [])


def damaged_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What reading all of a stage's files but rows finds missing or changed."""
    read = CHUNKS.get(str(manifest.get("stage")))
    return changed_files(directory, manifest) + (read(directory) if read else [])


def _is_as_listed(path: Path, entry: Any, largest: int | None) -> bool:
    if not path.is_file():
        return False
    if isinstance(entry, int):
        return file_crc32c(path) == entry
    if not isinstance(entry, dict) or (size := path.stat().st_size) != entry.get("bytes"):
        return False
    return (largest is not None and size > largest) or file_crc32c(path) == entry.get("crc32c")


def _results(directory: Path, stage: str) -> list[Path]:
    passed = {folder for pattern in PASSED_OVER.get(stage, ()) for folder in directory.glob(pattern)}
    if (directory / "stream.json").exists():
        passed.add(directory / STREAMED)
    found = []
    for folder, inner, names in os.walk(directory):
        here = Path(folder)
        inner[:] = [name for name in inner if here / name not in passed and not _holds_chunks(here, name)]
        found += [here / name for name in names if here != directory or name not in NO_RESULTS]
    return sorted(p for p in found if not p.name.startswith(".") and p.is_file() and not p.is_symlink())


def _holds_chunks(array: Path, name: str) -> bool:
    """Whether a folder holds the chunks of a Zarr array; a hook may be called c as well, and has its own zarr.json."""
    return name.startswith(".") or (
        name == "c" and (array / "zarr.json").exists() and not (array / name / "zarr.json").exists()
    )
