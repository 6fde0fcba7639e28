"""A server of this machine for token files, whose answers a test may spoil."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves the files of a folder by ranges."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        self.tags: list[str] = ['"1"']
        """ETags of the next answers; the last one stays. "": none."""
        self.modified = ""
        self.statuses: list[int] = []
        """Those of the next answers."""
        self.cut = 0
        """Answers that come cut short."""
        self.broken = 0
        """Answers whose connection ends within their body."""
        self.shift = 0
        """What is added to the end of a range in Content-Range."""
        self.gate: Callable[[str], None] = lambda name: None
        """Called before an answer."""
        self.connections = self.most = 0
        """Open now, and at most so far."""
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def blocks(self, name: str = "a.npy") -> list[str | None]:
        """The ranges of a file that were asked for."""
        return [block for asked, block in self.asked if asked == name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that has seen enough of an answer goes away.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        with self.server.lock:
            self.server.connections += 1
            self.server.most = max(self.server.most, self.server.connections)
        super().setup()

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections -= 1
        super().finish()

    def do_GET(self) -> None:
        server, path = self.server, self.server.folder / self.path.partition("?")[0].lstrip("/")
        server.asked.append((path.name, self.headers.get("Range")))
        server.gate(path.name)
        content = path.read_bytes() if path.is_file() else b""
        status = 200 if path.is_file() else 404
        with server.lock:
            tag = server.tags.pop(0) if len(server.tags) > 1 else server.tags[0]
        headers = {"ETag": tag, "Last-Modified": server.modified}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found and status == 200 and server.ranges:
            start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
            status = 206 if start < len(content) else 416
            headers["Content-Range"] = f"bytes {start}-{stop - 1 + server.shift}/{len(content)}"
            content = content[start:stop]
        if server.statuses:
            status = server.statuses.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        if server.cut:
            server.cut -= 1
            content = content[:-1]
        self.send_header("Content-Length", str(len(content) + bool(server.broken)))
        if server.broken:
            server.broken -= 1
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...
