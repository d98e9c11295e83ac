"""Where the files of a store lie: in a folder, or below a prefix of a bucket (`s3://bucket/prefix`, over obstore).

Everything of a store goes through `Files`. Names are relative, with slashes. A file is there whole or not at all, and
durable once `write` returns.

For a bucket, credentials, endpoint and region come from the environment as for other tools (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL, AWS_REGION); none of them is written or printed. Large
objects are sent in parts, several at once, each retried on its own.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from harvest.config import HarvestRuntime
from harvest.files import UnreachableError, UserError, fsync_path, is_abandoned, replacing
from harvest.stage_directory import Run

REDO = "`make verify` finds and marks what is bad, `make harvest` then redoes just that"
PART_BYTES = 16 << 20  # of an upload; the client gives a request 30 seconds
RETRIES: dict[str, Any] = {}  # obstore's: ten, over three minutes at most
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def damaged(place: Path | str, what: str) -> UserError:
    """The error for a file that is not as it was written, with the way out."""
    return UserError(f"{place}: {what}; {REDO}")


class Files(Protocol):
    """Files of one store.

    Methods raise UserError for a file that is missing or too short, OSError (which names the file) when a write
    fails, and UnreachableError when a bucket does not answer.
    """

    readers: int  # threads that read at once

    def place(self, name: str = "") -> Path | str:
        """How errors call a file: path or URL; without a name, the whole store."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        ...

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with a file's bytes from `offset` on."""
        ...

    def read_parts(self, name: str, starts: Sequence[int], size: int) -> bytes:
        """`size` bytes from each of several places of a file, one after another."""
        ...

    def write(self, name: str, parts: Iterable[bytes | memoryview], size: int) -> None:
        """Write a file of `size` bytes, given in parts."""
        ...

    def delete(self, *names: str) -> None:
        """Delete files, those that exist."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder; none where there is no such folder."""
        ...

    def entries(self, folder: str) -> list[str]:
        """Names of the files in a folder that has no folders, relative to it; none where there is no such folder."""
        ...

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of all files below a folder, by name, from a listing: no request a file in a bucket."""
        ...

    def sweep(self, alone: bool) -> None:
        """Remove what killed writers left half written; `alone`: also of other hosts, as nobody writes any more."""
        ...

    def delete_all(self) -> None:
        """Delete the store, records first: a shard without one does not count."""
        names = self.names()
        for records in (True, False):
            self.delete(*(name for name in names if ("/shards/" in name) is records))


class LocalFiles(Files):
    """Files in a folder."""

    readers = min(4, max(2, os.cpu_count() or 1))  # one alone does not fill a disk's queue; each checks what it reads

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self, name: str = "") -> Path:
        return self.path / name

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.place(name)}: cannot be read: {error.strerror}") from None

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        with self._opened(name) as descriptor:
            self._fill(descriptor, name, offset, out)

    def read_parts(self, name: str, starts: Sequence[int], size: int) -> bytes:
        data = bytearray(size * len(starts))
        with self._opened(name) as descriptor:
            for number, start in enumerate(starts):
                self._fill(descriptor, name, start, memoryview(data)[number * size : (number + 1) * size])
        return bytes(data)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY)
        except FileNotFoundError:
            raise damaged(self.place(name), "missing") from None
        try:
            yield descriptor
        except OSError as error:
            raise damaged(self.place(name), f"cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, name: str, offset: int, out: memoryview) -> None:
        while out:
            count = os.preadv(descriptor, [out], offset)
            if not count:
                raise damaged(self.place(name), "truncated")
            out, offset = out[count:], offset + count

    def write(self, name: str, parts: Iterable[bytes | memoryview], size: int) -> None:
        path = self.place(name)
        make_folder(path.parent)
        with replacing(path) as partial, partial.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is known at once; and half again as fast
            for part in parts:
                file.write(part)

    def delete(self, *names: str) -> None:
        for name in names:
            self.place(name).unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        try:
            entries = list(os.scandir(self.path / folder))
        except FileNotFoundError:
            return []
        prefix = f"{folder}/" if folder else ""
        found = [prefix + entry.name for entry in entries if entry.is_file()]
        folders = [prefix + entry.name for entry in entries if entry.is_dir()]  # or links to some on another disk
        return [*found, *(name for below in folders for name in self.names(below))]

    def entries(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.path / folder)
        except FileNotFoundError:
            return []

    def sizes(self, folder: str = "") -> dict[str, int]:
        sizes = ((name, self.size(name)) for name in self.names(folder))
        return {name: size for name, size in sizes if size is not None}  # a partial file may have got its name

    def sweep(self, alone: bool) -> None:
        for path in [self.place(name) for name in self.names() if name.endswith(".partial")]:
            if is_abandoned(path, alone):
                path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each entry durable."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


class RemoteFiles(Files):
    """Files below `url`, s3://bucket/prefix. An object appears whole when its upload ends."""

    readers = 16  # each waits for the network most of the time

    def __init__(self, url: str, allow_http: bool) -> None:
        """Raises UserError without obstore, and for a plain http endpoint that is not allowed."""
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise UserError(
                f"{url}: remote stores need obstore, which is not installed: "
                ".venv/bin/python -m pip install -c constraints.txt -e '.[s3]'"
            ) from None
        self.url, self._obstore = url, obstore
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._store = S3Store(
            self._bucket,
            prefix=prefix,
            client_options={"allow_http": _may_use_http(url, allow_http)},
            retry_config=RETRIES or None,  # pyright: ignore[reportArgumentType]
        )

    def place(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Raise the client's errors anew, as one sentence with the object's name.

        Of the client's own text only status and code are shown: it holds the endpoint.
        """
        errors = self._obstore.exceptions
        try:
            yield
        except (FileNotFoundError, errors.BaseError) as error:
            code = _code(error)
            if isinstance(error, FileNotFoundError) or "NoSuchBucket" in code:
                why = f"there is no bucket {self._bucket!r} at this endpoint; make it, or look at harvest.runtime.store"
                why += " and AWS_ENDPOINT_URL"
            elif isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
                why = f"access denied{code}; look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and "
                why += "whether they may read, write, list and delete there"
            else:
                why = f"the object store does not answer as it should{code}; look at the network, AWS_ENDPOINT_URL, "
                why += "AWS_REGION and the credentials"
            again = "What was complete is untouched; run the same command again to go on"
            raise UnreachableError(f"{self.place(name)}: {why}. {again}") from None

    def size(self, name: str) -> int | None:
        with self._named(name):
            try:
                return self._obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with self._named(name):
            try:
                return bytes(self._obstore.get(self._store, name).bytes())
            except FileNotFoundError:
                raise UserError(f"{self.place(name)}: missing") from None

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        (data,) = self._ranges(name, [offset], len(out))
        out[:] = memoryview(data)

    def read_parts(self, name: str, starts: Sequence[int], size: int) -> bytes:
        length = self.size(name)  # the client panics at ranges that an object does not reach
        if length is None or length < max(starts) + size:
            raise damaged(self.place(name), "missing" if length is None else "truncated")
        return b"".join(bytes(data) for data in self._ranges(name, starts, size))

    def _ranges(self, name: str, starts: Sequence[int], size: int) -> list[Any]:
        with self._named(name):
            try:
                found = self._obstore.get_ranges(self._store, name, starts=starts, lengths=[size] * len(starts))
            except FileNotFoundError:
                raise damaged(self.place(name), "missing") from None
        if any(len(data) != size for data in found):
            raise damaged(self.place(name), "truncated")
        return found

    def write(self, name: str, parts: Iterable[bytes | memoryview], size: int) -> None:  # noqa: ARG002
        with self._named(name):
            self._obstore.put(self._store, name, b"".join(parts), chunk_size=PART_BYTES)

    def delete(self, *names: str) -> None:
        if names:
            with self._named(names[0]):
                self._obstore.delete(self._store, list(names))

    def names(self, folder: str = "") -> list[str]:
        return list(self.sizes(folder))

    def entries(self, folder: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in self.names(folder)]

    def sizes(self, folder: str = "") -> dict[str, int]:
        with self._named(folder):
            pages = self._obstore.list(self._store, folder or None)
            return {found["path"]: found["size"] for page in pages for found in page}

    def sweep(self, alone: bool) -> None:
        """Objects have no partial names."""


def files_of(directory: Path, runtime: HarvestRuntime | None = None) -> Files:
    """The store of a harvest's run directory, in the folder or bucket where it was begun.

    Raises UserError when settings name another place, and as `RemoteFiles` does.
    """
    run = Run(directory)
    place = run.begun.get("store") if run.is_begun else None
    wanted = runtime.store_at(directory.name) if runtime else None
    if wanted and wanted["url"] != (place or {}).get("url"):
        raise UserError(
            f"harvest.runtime.store: {wanted['url']}: this harvest was begun in "
            f"{place['url'] if place else directory}; go on there, or start anew with --force"
        )
    place = wanted or place
    return RemoteFiles(place["url"], place["allow_http"]) if place else LocalFiles(directory / "store")


def _may_use_http(url: str, allowed: bool) -> bool:
    """Whether requests go over plain http: to this machine, or where a setting allows it.

    Raises UserError where the endpoint is plain http and may not be.
    """
    variable = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    endpoint = urlsplit(os.environ[variable] if variable else "")
    if endpoint.scheme != "http":
        return False
    if not allowed and not _is_loopback(endpoint.hostname or ""):
        raise UserError(
            f"{url}: {variable} is plain http to another machine, which shows credentials and data to the network; "
            "use https, or set harvest.runtime.allow_http=true"
        )
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _code(error: Exception) -> str:
    """HTTP status and S3's error code, as far as the client's message has them."""
    status = re.search(r"\b([45]\d\d) [A-Z][a-z]+", str(error))
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    found = [match[1] for match in (status, code) if match]
    return f" ({' '.join(found)})" if found else ""
