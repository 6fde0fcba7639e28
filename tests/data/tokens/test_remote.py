"""Token files behind a URL, by a server of this machine: ranges alone are asked for, once, and kept."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.data.tokens import remote
from pipeline.data.tokens.remote import Remote, default_cache
from pipeline.data.tokens.sidecar import Sidecar
from pipeline.files.output import write_json
from tests.data.tokens.conftest import open_loader, write

IDS = np.random.default_rng(0).integers(0, 256, 5000)
SIZE = 2 * len(IDS)


class Server(ThreadingHTTPServer):
    """Serves the files of a folder by ranges; a test may spoil its answers."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, []
        self.ranges, self.tag = True, '"1"'
        self.statuses: list[int] = []
        """Those of the next answers."""
        self.cut = 0
        """Answers that come cut short."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that has seen enough of an answer goes away.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, path = self.server, self.server.folder / self.path.partition("?")[0].lstrip("/")
        server.asked.append((path.name, self.headers.get("Range")))
        content = path.read_bytes() if path.is_file() else b""
        status = 200 if path.is_file() else 404
        headers = {"ETag": server.tag}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found and status == 200 and server.ranges:
            start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
            status = 206 if start < len(content) else 416
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        if server.statuses:
            status = server.statuses.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.cut:
            server.cut -= 1
            content = content[:-1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "BLOCK", 1024)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()


@pytest.fixture
def file(server: Server) -> str:
    return write(server.folder / "a.npy", IDS)


def test_windows_are_those_of_the_file_and_are_fetched_once(server: Server, file: str, tmp_path: Path) -> None:
    options = {"token_cache": str(tmp_path / "cache"), "batch_size": 8}
    local, far = (open_loader([name], **options) for name in (file, f"{server.url}/a.npy?key=b"))
    for _ in range(80):
        for one, other in zip(local.next_step(), far.next_step(), strict=True):
            assert one.input_ids.equal(other.input_ids)
    blocks = [asked for name, asked in server.asked if name == "a.npy"]
    assert len(blocks) == len(set(blocks)) == -(-SIZE // 1024) and None not in blocks
    again = open_loader([f"{server.url}/a.npy?key=c"], **options)
    again.next_step()
    assert len([name for name, _ in server.asked if name == "a.npy"]) == len(blocks) + 1, "the size alone is asked for"
    # The same content in either place is the same data.
    again.load_state_dict(local.state_dict())
    local.load_state_dict(far.state_dict())


def test_what_will_be_read_is_fetched_before(server: Server, file: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    loader = open_loader([f"{server.url}/a.npy"], token_cache=cache, batch_size=1, shuffle=False, held_out=True,
                         held_out_tokens=(f"{server.url}/a.npy",))  # fmt: skip
    loader.next_step()
    # 1 + 64 windows of 16 ids of 2 bytes.
    wanted = {f"bytes={start}-{start + 1023}" for start in range(0, 65 * 32, 1024)}
    deadline = time.monotonic() + 10
    while not wanted <= {asked for _, asked in server.asked} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wanted <= {asked for _, asked in server.asked}


def test_a_damaged_block_of_the_cache_is_fetched_again(server: Server, file: str, tmp_path: Path) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    content = Path(file).read_bytes()
    assert Remote(url, cache).read(0, SIZE) == content
    (data,) = cache.glob("*.data")
    spoilt = bytearray(data.read_bytes())
    spoilt[3000] ^= 1
    data.write_bytes(spoilt)
    asked = len(server.asked)
    found = Remote(url, cache)
    assert found.read(100, 0) == b"" and found.read(1000, 5000) == content[1000:6000]
    assert [block for _, block in server.asked[asked:]] == ["bytes=0-1023", "bytes=2048-3071"]
    server.tag = '"2"'
    assert Remote(url, cache).read(0, SIZE) == content
    assert len(list(cache.glob("*.data"))) == 2, "another version has blocks of its own"


def test_a_server_may_fail_for_a_moment(server: Server, file: str, tmp_path: Path) -> None:
    server.statuses, server.cut = [503, 500], 3
    assert Remote(f"{server.url}/a.npy", tmp_path / "cache").read(0, SIZE) == Path(file).read_bytes()


def test_what_cannot_be_read_is_said_in_one_line(server: Server, file: str, tmp_path: Path, refusal) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    server.statuses = [503] * 5
    assert "cannot be read after 5 tries (the server answers 503): check the network" in refusal(Remote, url, cache)
    server.cut = 5
    assert "bytes came of 1024" in refusal(Remote, url, cache)
    assert "(status 404): check the address" in refusal(Remote, f"{server.url}/b.npy", cache)
    server.statuses = [403]
    assert "(status 403): check that it may be read from here" in refusal(Remote, url, cache)
    assert "check the network" in refusal(Remote, "http://127.0.0.1:9/a.npy", cache)
    assert "check the address" in refusal(Remote, "http://:80:80/a.npy", cache)
    write(server.folder / "empty.npy", [])
    assert "is empty" in refusal(Remote, f"{server.url}/empty.npy", cache)
    (tmp_path / "file").write_text("")
    assert "name another folder with --data.token-cache" in refusal(Remote, url, tmp_path / "file")
    found = Remote(url, cache)
    server.tag = '"2"'
    assert "has changed on the server while it was read" in refusal(found.read, 4096, 10)


def test_a_url_without_ranges_ends_in_one_line_and_exit_code_2(
    server: Server, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "mnemos" / "tokens"
    server.ranges = False
    assert main(["data", "inspect", f"{server.url}/a.npy", "--tokenizer", "bytes"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is served whole, without ranges (status 200): download it" in error


def test_the_sidecar_of_a_url_is_read(server: Server, tmp_path: Path) -> None:
    write(server.folder / "wide.npy", IDS, "uint32")
    write_json(server.folder / "wide.npy.json", Sidecar("uint32", 5000, 1, 260, 256, "bytes", "", "").to_json())
    loader = open_loader([f"{server.url}/wide.npy?key=b"], token_cache=str(tmp_path), shuffle=False)
    assert loader.next_step()[0].input_ids.flatten().tolist() == IDS[:32].tolist()
    (server.folder / "wide.npy.json").write_text("<html>not found</html>")
    assert len(open_loader([f"{server.url}/wide.npy"], token_cache=str(tmp_path), token_dtype="uint32").sources) == 1
