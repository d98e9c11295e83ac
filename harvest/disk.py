"""What a store takes on the disk, and whether there is room for it: said before the first shard, not hours later."""

import re
import shutil
from pathlib import Path

from harvest.files import UserError
from harvest.progress import size_text
from harvest.store_layout import Geometry, stored_arrays

BLOCK = 4096  # a file takes whole blocks of the file system
UNITS = {f"{prefix}{i}b": (1024 if i else 1000) ** n for n, prefix in enumerate(["", *"kmgt"]) for i in ("", "i")}
LIMIT = re.compile(r"(\d+(?:\.\d+)?) ?(shards?|windows?|[kmgt]?i?b)?", re.IGNORECASE)


def shard_bytes(geometry: Geometry) -> int:
    """Bytes on the disk of one shard of either split, all hooks, in whole blocks; compressed ones take less."""
    files = [array.file_bytes for array in stored_arrays(geometry, "train").values()]
    files.append(1)  # the record
    return sum(-(-size // BLOCK) * BLOCK for size in files)


def check_room(directory: Path, shards: int, geometry: Geometry, less: str = "lower sample.train_tokens") -> None:
    """Raise UserError when so many shards that are still to be written do not fit on the folder's disk.

    `less` is what makes them fewer.
    """
    needed, free = shards * shard_bytes(geometry), shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory}: {shards:,} shards are still to be written, {size_text(needed)}, and the disk has "
            f"{size_text(free)} free. Make room (`make prune` lists old runs), choose another disk with --runs, "
            f"or {less}"
        )


def check_room_for_contexts(directory: Path, tokens: int, unpacked: int) -> None:
    """Raise UserError when the contexts of so many tokens do not fit on the folder's disk.

    They take 8 bytes a token (its id, its document), and as much again in scratch files until they are shuffled.
    `unpacked` bytes of the sources' files stand beside them meanwhile.
    """
    begun = [path for folder in ("scratch", "contexts") for path in directory.glob(f"{folder}/**/*") if path.is_file()]
    needed = 16 * tokens + unpacked - sum(path.stat().st_blocks * 512 for path in begun)
    free = shutil.disk_usage(directory).free
    if needed > free:
        files = f", {size_text(unpacked)} of it for unpacked files of the sources" if unpacked else ""
        raise UserError(
            f"sample.train_tokens, sample.holdout_tokens: {tokens:,} tokens take {size_text(needed)} more in "
            f"{directory} while they are sampled{files}, and its disk has {size_text(free)} free; lower them, make "
            "room (`make prune` lists old runs), or choose another disk with --runs"
        )


def limit_in_shards(limit: str, shard: int, window_shards: int, train_shards: int) -> int:
    """Training shards that `harvest.runtime.disk_limit` has room for, of `shard` bytes each.

    What else the training split has on the disk is taken off first: a block for every record.
    """
    found = LIMIT.fullmatch(limit)
    assert found, limit  # checked with the settings
    number, unit = float(found[1]), (found[2] or "b").lower().rstrip("s")
    if unit in ("shard", "window"):
        return int(number * (window_shards if unit == "window" else 1))
    return int((number * UNITS[unit] - BLOCK * train_shards) // shard)
