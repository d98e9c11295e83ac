"""A store's files in an object store, `s3://bucket/prefix`, over obstore.

Credentials, endpoint and region come from the environment as for other tools (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL, AWS_REGION); none of them is written or printed.
Plain http is for this machine alone, unless a setting allows more. An object appears whole when its upload
ends, so nothing has a partial name; large ones are sent in parts, several at once, each tried again on its own.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from harvest.direct_io import ChunkFile, Packed, Written, damaged
from harvest.files import UnreachableError, UserError
from harvest.store_files import Files

PART_BYTES = 16 << 20  # of an upload; the client gives a request 30 seconds
RETRIES: dict[str, Any] = {}  # obstore's: ten, over three minutes at most
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class RemoteFiles(Files):
    """Files below `url`, s3://bucket/prefix."""

    readers = 16  # each waits for the network most of the time

    def __init__(self, url: str, allow_http: bool) -> None:
        """Raises UserError without obstore, and for an endpoint of plain http that is not allowed."""
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise UserError(
                f"{url}: remote stores need obstore, which is not installed: "
                ".venv/bin/python -m pip install -c constraints.txt -e '.[s3]'"
            ) from None
        self.url, self._obstore = url, obstore
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._store = S3Store(
            bucket,
            prefix=prefix,
            client_options={"allow_http": _may_use_http(url, allow_http)},
            retry_config=RETRIES or None,  # pyright: ignore[reportArgumentType]
        )

    def place(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Raises errors inside anew, as one sentence with the object's name; "not found" is said of the bucket.

        Of the client's own text only status and code are shown: it holds the endpoint.
        """
        errors = self._obstore.exceptions
        try:
            yield
        except (FileNotFoundError, errors.BaseError) as error:
            code = _code(error)
            if isinstance(error, FileNotFoundError) or "NoSuchBucket" in code:
                bucket = self.url.removeprefix("s3://").split("/")[0]
                why = f"there is no bucket {bucket!r} at this endpoint; make it, or look at harvest.runtime.store and"
                why += " AWS_ENDPOINT_URL"
            elif isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
                why = f"access denied{code}; look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and "
                why += "whether they may read, write, list and delete there"
            else:
                why = f"the object store does not answer as it should{code}; look at the network, AWS_ENDPOINT_URL, "
                why += "AWS_REGION and the credentials"
            again = "What was complete is untouched; the same command goes on from there"
            raise UnreachableError(f"{self.place(name)}: {why}. {again}") from None

    def settle(self, name: str) -> None:
        """An object that was put is durable."""

    def size(self, name: str) -> int | None:
        with self.named(name):
            try:
                return self._obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with self.named(name):
            try:
                return bytes(self._obstore.get(self._store, name).bytes())
            except FileNotFoundError:
                raise UserError(f"{self.place(name)}: missing") from None

    def ranges(self, name: str, starts: list[int], sizes: list[int]) -> list[Any]:
        """Bytes of an object at several places, asked for at once.

        Raises UserError where it is missing or ends before.
        """
        with self.named(name):
            try:
                found = self._obstore.get_ranges(self._store, name, starts=starts, lengths=sizes)
            except FileNotFoundError:
                raise damaged(self.place(name), "missing") from None
            except self._obstore.exceptions.GenericError:
                size = self._obstore.head(self._store, name)["size"]
                if size >= max(start + length for start, length in zip(starts, sizes, strict=True)):
                    raise
                raise damaged(self.place(name), "truncated") from None
        if [len(data) for data in found] != sizes:
            raise damaged(self.place(name), "truncated")
        return found

    def write(self, name: str, data: bytes) -> None:
        with self.named(name):
            self._obstore.put(self._store, name, data, chunk_size=PART_BYTES)

    def delete(self, name: str) -> None:
        with self.named(name):
            self._obstore.delete(self._store, name)

    def names(self, folder: str = "") -> list[str]:
        with self.named(folder):
            return [found["path"] for page in self._obstore.list(self._store, folder or None) for found in page]

    @contextmanager
    def open_chunks(self, name: str) -> Iterator[ChunkFile]:
        yield RemoteChunkFile(self, name)

    def write_chunks(self, name: str, packed: Packed) -> Written:
        self.write(name, b"".join(packed.parts()))
        return packed.written()

    def zarr_store(self) -> Any:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store)

    def sweep(self, is_abandoned: Callable[[Path], bool]) -> None:
        """There are no partial names."""

    def delete_all(self) -> None:
        self.delete("created.json")
        names = self.names()
        with self.named(""):
            for records in (True, False):
                if gone := [name for name in names if ("/shards/" in name) is records]:
                    self._obstore.delete(self._store, gone)


class RemoteChunkFile(ChunkFile):
    """A file of chunks in an object store, read by ranges."""

    def __init__(self, files: RemoteFiles, name: str) -> None:
        super().__init__(files.place(name), -1)
        self._files, self._name = files, name

    def length(self) -> int:
        size = self._files.size(self._name)
        if size is None:
            raise damaged(self.path, "missing")
        return size

    def _fill(self, out: memoryview, offset: int) -> None:
        (data,) = self._files.ranges(self._name, [offset], [len(out)])
        out[:] = memoryview(data)

    def checksums(self, index: np.ndarray) -> bytes:
        ends = index.sum(1).tolist()
        found = self._files.ranges(self._name, [end - 4 for end in ends], [4] * len(ends))
        return b"".join(bytes(data) for data in found)


def _may_use_http(url: str, allowed: bool) -> bool:
    """Whether requests go over plain http: to this machine, or where a setting allows it.

    Raises UserError where the endpoint is plain http and may not be.
    """
    variable = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    endpoint = urlsplit(os.environ[variable]) if variable else urlsplit("")
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
