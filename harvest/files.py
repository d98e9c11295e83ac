"""Files that survive a crash: atomic writes, locks that the kernel frees, errors that a user can act on."""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

_UMASK = os.umask(0o022)  # reading it means setting it
os.umask(_UMASK)

MAX_JSON_BYTES = 64 << 20  # what we write ourselves stays far below
SEAL = "crc32c"  # of a sealed JSON file: the checksum of all else in it
BLOCK = 16 << 20
LOCK = ".lock-"


class UserError(Exception):
    """Something that the user can mend: one clear sentence with the file or setting, the value, the way out."""


# What torch says with a plain RuntimeError: of a CPU, of pinned memory, of cuBLAS' workspace.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch got no memory, on the host or a device."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or any(said in str(error) for said in NO_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_torchs)


@contextlib.contextmanager
def enough_memory(else_said: str) -> Iterator[None]:
    """Raise UserError with this sentence where memory does not suffice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(else_said) from None


class UnreachableError(Exception):
    """A file that cannot be read now, which says nothing about its bytes."""


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(path: Path) -> Path:
    """A sibling name for a file that is being written; host and pid keep two writers apart."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def is_abandoned(partial: Path, alone: bool) -> bool:
    """Whether nobody writes this partial file any more: its process is gone from this host.

    Of other hosts' files, and of names without host and pid (zarr's own), `alone` decides: no other worker lives.
    """
    mine = re.fullmatch(rf"\..+\.{re.escape(socket.gethostname())}\.(\d+)\.partial", partial.name)
    if not mine:
        return alone
    try:
        os.kill(int(mine[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, but alive
        return False
    return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a partial name to fill, then fsync, rename, fsync of the folder."""
    partial = partial_name(path)
    try:
        yield partial
        partial.chmod(0o666 & ~_UMASK)  # safetensors makes its files readable by the owner alone
        fsync_path(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is met in a write, which does not know its file
            error.filename = str(path)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys sorted, so that equal values give equal bytes."""
    with replacing(path) as partial:
        partial.write_bytes(json_bytes(value))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of itself, which `read_json` compares: a changed figure does not pass."""
    write_json(path, sealed(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum, which `read_json` compares, as one more key."""
    return value | {SEAL: google_crc32c.value(json_bytes(value))}


def file_crc32c(path: Path, size: int | None = None) -> int:
    """crc32c of a file, or of its first `size` bytes."""
    checksum, left = 0, path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left and (block := file.read(min(left, BLOCK))):
            checksum, left = google_crc32c.extend(checksum, block), left - len(block)
    return checksum


class Stamp(NamedTuple):
    """What changes when a file's content does."""

    size: int
    mtime_ns: int
    ctime_ns: int  # the kernel's own: it is not set back with mtime
    inode: int


def stamp_of(stat: os.stat_result) -> Stamp:
    """The stamp in what the system says of a file."""
    return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def file_stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    return stamp_of(path.stat())


def json_bytes(value: Any) -> bytes:
    """A JSON file as we write it."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """A JSON object from a file, without its seal; with `sealed`, it has to have one.

    Raises UserError when it is missing, too large, not a JSON object, or not what was sealed.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES} bytes; this is not a file of ours")
        return parse_json(path.read_bytes(), path, sealed=sealed)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(data: bytes, place: Path | str, *, sealed: bool = False) -> dict[str, Any]:
    """A JSON object from a file's bytes, as `read_json` gives it; `place` is the file's name in errors.

    Raises UserError when it is too large, or not a JSON object.
    """
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{place}: larger than {MAX_JSON_BYTES} bytes; this is not a file of ours")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{place}: not valid JSON; it was damaged or half copied") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: not a JSON object; it was damaged or half copied")
    if (sealed or SEAL in value) and value.pop(SEAL, None) != google_crc32c.value(json_bytes(value)):
        raise UserError(
            f"{place}: does not match its own checksum; it was changed or damaged. Restore it, or make it anew"
        )
    return value


@contextlib.contextmanager
def locked(directory: Path, role: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the one lock of a role in a folder, or share it; the kernel frees it, also at kill -9.

    Raises UserError when another process holds it (holds it alone, for a shared one).
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{LOCK}{role}"
    with path.open("a+") as file:  # over NFS a shared lock needs a file open for reading, an exclusive one for writing
        for last_try in (False, False, True):  # `is_locked` holds it for an instant
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last_try:
                    raise UserError(
                        f"{directory}: another process is running this {role}; wait for it or stop it"
                    ) from None
                time.sleep(0.1)
        if not shared:
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
            file.flush()
        yield


def is_locked(directory: Path, role: str) -> bool:
    """Whether a process holds or shares the lock of this role now."""
    path = directory / f"{LOCK}{role}"
    try:
        file = path.open("r+")
    except FileNotFoundError:
        return False
    except OSError:
        file = path.open("r")  # a folder that may only be read
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
