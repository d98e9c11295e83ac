"""An object store over HTTP on 127.0.0.1: as much of S3 as a store needs, in memory.

GET (with Range), HEAD, PUT, DELETE, ListObjectsV2, DeleteObjects, uploads in parts. The key id decides: "reader" may
not write, "nobody" may do nothing.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "activations"
PAGE = 7  # keys of a listing's page: small, so that a test sees more than one


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.failing = "-"  # end of the key of an object that cannot be had
        self.requests: list[tuple[str, str]] = []  # method and key, in order

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement
    wbufsize = -1
    server: Server

    def log_message(self, *_arguments) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, key))
        who = re.search(r"Credential=(\w+)/", self.headers.get("Authorization", ""))
        if not who or who[1] == "nobody" or (who[1] == "reader" and self.command in ("PUT", "POST", "DELETE")):
            self.refuse(403, "AccessDenied")
        elif key.endswith(self.server.failing):
            self.refuse(503, "SlowDown")
        elif bucket != BUCKET:
            self.refuse(404, "NoSuchBucket")
        elif self.command in ("GET", "HEAD"):
            self.list(query) if "list-type" in query else self.get(key)
        elif self.command == "PUT" and "uploadId" in query:
            self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self.answer(200, ETag=tag(body))
        elif self.command == "PUT":
            self.server.objects[key] = body
            self.answer(200, ETag=tag(body))
        elif self.command == "DELETE":
            self.server.objects.pop(key, None)
            self.answer(204)
        elif "delete" in query:
            names = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for name in names:
                self.server.objects.pop(name, None)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        elif "uploads" in query:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = {}
            found = f"<Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key><UploadId>{number}</UploadId>"
            self.answer(200, f"<InitiateMultipartUploadResult>{found}</InitiateMultipartUploadResult>".encode())
        else:
            sent = self.server.uploads.pop(query["uploadId"])
            self.server.objects[key] = b"".join(sent[number] for number in sorted(sent))
            found = f"<Key>{escape(key)}</Key><ETag>{tag(self.server.objects[key])}</ETag>"
            self.answer(200, f"<CompleteMultipartUploadResult>{found}</CompleteMultipartUploadResult>".encode())

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_request

    def get(self, key: str) -> None:
        if key not in self.server.objects:
            self.refuse(404, "NoSuchKey")
            return
        data = self.server.objects[key]
        shared = {"ETag": tag(data), "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(200, data if self.command == "GET" else b"", length=str(len(data)), **shared)
            return
        first = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
        last = min(int(wanted[2] or len(data)), len(data) - 1) if wanted[1] else len(data) - 1
        if first >= len(data):
            self.refuse(416, "InvalidRange")
            return
        self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **shared)

    def list(self, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", query.get("start-after", ""))
        keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
        page, more = keys[:PAGE], keys[PAGE:]
        out = [f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"]
        if more:
            out.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for key in page:
            data = self.server.objects[key]
            about = (
                f"<Size>{len(data)}</Size><ETag>{tag(data)}</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            )
            out.append(f"<Contents><Key>{escape(key)}</Key>{about}</Contents>")
        self.answer(200, f"<ListBucketResult>{''.join(out)}</ListBucketResult>".encode())


def tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
