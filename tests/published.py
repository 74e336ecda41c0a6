"""A hub and a bucket on this machine: what their real clients ask for, over HTTP, with faults to order."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass(kw_only=True)
class Publisher:
    """Serves `files` as the repository `acme/pi0` and as the folder `gs://shelf/pi0`."""

    files: dict[str, bytes]
    address: str = ""
    gated: bool = False
    cut: list[int] = field(default_factory=list)  # connections still to break, each after so many bytes of a file
    whole: bool = False  # answers a request for a range with everything
    damage: str = ""  # name of a file that is served with another first byte
    composite: bool = False  # the bucket knows no md5
    seconds_per_request: float = 0.0
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # file, first byte asked for, bytes sent

    @property
    def sent(self) -> int:
        return sum(count for _, _, count in self.ranges)

    def answer(self, path: str, start: int | None, end: int | None) -> tuple[int, Any, str]:
        """(status, JSON or bytes, name of the file if it is one)."""
        if match := re.fullmatch(rf"/api/models/acme/pi0/tree/{COMMIT}", path):
            return 200, [self._entry(name) for name in self.files], ""
        if re.fullmatch(r"/api/models/acme/pi0(/revision/\w+)?", path):
            return 200, {"id": "acme/pi0", "sha": COMMIT, "siblings": [], "private": False}, ""
        if match := re.fullmatch(rf"/acme/pi0/resolve/{COMMIT}/(.*)", path):
            return (403, {}, "gated") if self.gated else (206, self._part(match[1], start, end), match[1])
        if path == "/storage/v1/b/shelf/o":
            return 200, {"items": [self._object(name) for name in self.files]}, ""
        if match := re.fullmatch(r"/storage/v1/b/shelf/o/pi0/(.*)", path):
            return (200, self._object(match[1]), "") if match[1] in self.files else (404, {}, "")
        if match := re.fullmatch(r"/download/storage/v1/b/shelf/o/pi0/(.*)", path):
            return 206, self._part(match[1], start, end), match[1]
        return (
            401 if path.startswith("/api/") else 404,
            {"error": "nothing here"},
            "",
        )  # as the hub says of no repository

    def _part(self, name: str, start: int | None, end: int | None) -> bytes:
        content = self.files[name]
        if name == self.damage:
            content = bytes([content[0] ^ 1]) + content[1:]
        return content if self.whole else content[start or 0 : len(content) if end is None else end + 1]

    def _entry(self, name: str) -> Mapping[str, Any]:
        content = self.files[name]
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": git}
        if name.endswith((".safetensors", ".bin")):
            sha = hashlib.sha256(content).hexdigest()
            entry |= {"oid": "0" * 40, "lfs": {"oid": sha, "size": len(content), "pointerSize": 130}}
        return entry

    def _object(self, name: str) -> Mapping[str, Any]:
        import google_crc32c  # pyright: ignore[reportMissingImports]

        content = self.files[name]
        crc = google_crc32c.Checksum(content).digest()
        entry = {"name": f"pi0/{name}", "size": str(len(content)), "crc32c": base64.b64encode(crc).decode()}
        md5 = {} if self.composite else {"md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode()}
        return entry | md5


@contextmanager
def publish(**options: Any) -> Iterator[Publisher]:
    publisher = Publisher(**options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(found[1]) if found else None
            end = int(found[2]) if found and found[2] else None
            status, body, name = publisher.answer(unquote(urlsplit(self.path).path), start, end)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            time.sleep(publisher.seconds_per_request if name else 0)
            cut = publisher.cut.pop(0) if isinstance(body, bytes) and publisher.cut else None
            self.send_response(status)
            if name == "gated":
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:cut])
            if isinstance(body, bytes):
                publisher.ranges.append((name, start or 0, len(data[:cut])))
            if cut is not None:
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            names = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            data = json.dumps([publisher._entry(name) for name in names if name in publisher.files]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    publisher.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield publisher
    finally:
        server.shutdown()
        server.server_close()
