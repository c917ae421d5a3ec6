"""A small object store on localhost: the S3 protocol with checked signatures, or a plain web server; faults on demand.

Its S3 side does what a reader needs: GetObject, ListObjectsV2 with a delimiter, errors in XML, and it refuses a request
whose AWS signature (version 4) does not fit the key. Faults are scripted per path and taken in turn.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

ACCESS_KEY, SECRET_KEY, REGION = "AKIAVELOPATHTEST0001", "velopath-secret-key-of-the-tests", "eu-test-1"


class ObjectServer(ThreadingHTTPServer):
    """Serves the files below `root`; `s3` adds the protocol, with `root/BUCKET/KEY` as objects.

    `faults[path]` is a list of faults for the next requests of that path: a status number, "reset", "stall", "short"
    (a body cut in half), "wrong" (a byte flipped), a float (seconds to wait first), a URL to send the client to; "ok"
    does nothing. The last fault
    of a list that ends with "..." lasts. `gets` counts requests by path, `query` is what a web server asks for, if set.
    """

    daemon_threads = True

    def __init__(self, root: Path, *, s3: bool = False, query: str = "", user: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.s3, self.query, self.user = root, s3, query, user
        self.faults: dict[str, list[object]] = {}
        self.gets: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, path: str) -> object:
        with self.lock:
            self.gets[path] += 1
            queue = self.faults.get(path) or next((q for p, q in self.faults.items() if p == "*"), [])
            if not queue:
                return "ok"
            return queue[0] if len(queue) == 2 and queue[1] == "..." else queue.pop(0)

    def handle_error(self, request: object, address: object) -> None:  # a client that went away is no news
        pass


@contextmanager
def serving(root: Path, **options: object) -> Iterator[ObjectServer]:
    server = ObjectServer(root, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ObjectServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if self.server.s3 and (problem := _signature_problem(self)):
            return self._reply(403, _xml_error("SignatureDoesNotMatch", problem))
        listing = self.server.s3 and "list-type" in parts.query
        fault = self.server.next_fault(path) if not listing or path in self.server.faults else "ok"
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int):
            return self._reply(fault, _xml_error("InternalError", f"injected for {self.path}"))
        if isinstance(fault, str) and fault.startswith("http"):
            return self._head(302, 0, fault)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if listing:
            return self._reply(200, self._listing(path.strip("/"), parse_qs(parts.query)))
        return self._file(self.server.root / path.strip("/"), fault, parts.query)

    def _file(self, file: Path, fault: object, query: str) -> None:
        wanted = self.headers.get("Authorization", "")
        if not self.server.s3 and (
            query != self.server.query or (self.server.user and self.server.user not in wanted)
        ):
            return self._reply(403, b"denied")
        if not file.is_file():
            return self._reply(404, _xml_error("NoSuchKey", "no such key"))
        body = bytearray(file.read_bytes())
        if fault == "wrong":
            body[len(body) // 2] ^= 1
        self._head(200, len(body))
        with suppress(OSError):
            if fault in ("short", "stall"):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if fault == "stall":
                    self.server.closing.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(body)
        return None

    def _head(self, status: int, length: int, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", self.date_time_string())
        self.send_header("ETag", '"0"')
        self.end_headers()

    def _reply(self, status: int, body: bytes) -> None:
        self._head(status, len(body))
        self.wfile.write(body)

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        folder = self.server.root / bucket / prefix
        inner = ""
        for item in sorted(folder.iterdir()) if folder.is_dir() else []:
            if item.is_dir():
                inner += f"<CommonPrefixes><Prefix>{prefix}{item.name}/</Prefix></CommonPrefixes>"
            else:
                inner += (
                    f"<Contents><Key>{prefix}{item.name}</Key><Size>{item.stat().st_size}</Size><ETag>0</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        return (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>1</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{inner}</ListBucketResult>"
        ).encode()


def _xml_error(code: str, message: str) -> bytes:
    inner = f"<Code>{code}</Code><Message>{message}</Message><AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId>"
    return f"<Error>{inner}</Error>".encode()


def _signature_problem(request: BaseHTTPRequestHandler) -> str:
    """What is wrong with a request's signature, "" where nothing is (AWS Signature Version 4)."""
    found = re.match(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request, ?SignedHeaders=([^,]+), ?Signature=(\w+)",
        request.headers.get("Authorization", ""),
    )
    if not found or found[1] != ACCESS_KEY:
        return "no credential that is known"
    parts = urlsplit(request.path)
    query = "&".join(
        f"{quote(k, safe='-_.~')}={quote(v[0], safe='-_.~')}"
        for k, v in sorted(parse_qs(parts.query, keep_blank_values=True).items())
    )
    headers = "".join(f"{name}:{request.headers.get(name, '').strip()}\n" for name in found[4].split(";"))
    body = request.headers.get("x-amz-content-sha256", "")
    canonical = "\n".join([request.command, parts.path, query, headers, found[4], body])
    scope = f"{found[2]}/{found[3]}/s3/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", request.headers.get("x-amz-date", ""), scope, hashed])
    sign: Callable[[bytes, str], bytes] = lambda key, part: hmac.digest(key, part.encode(), "sha256")  # noqa: E731
    key = b"AWS4" + SECRET_KEY.encode()
    for part in (found[2], found[3], "s3", "aws4_request"):
        key = sign(key, part)
    return "" if hmac.compare_digest(sign(key, text).hex(), found[5]) else "the signature does not fit"
