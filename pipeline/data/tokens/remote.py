"""A token file behind a URL: range requests, some blocks at once, each kept on disk."""

from __future__ import annotations

import os
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64, xxh3_128

from pipeline.data.tokens.files import DTYPES, Layout, count_tokens
from pipeline.errors import UserError, brief

BLOCK = 1 << 16
"""Bytes of one request."""
CONNECTIONS = 16
ATTEMPTS, PAUSE = 5, 1.0
"""Tries of a request, and seconds before the second; each pause is twice the one before."""
TIMEOUT = 30.0
_DIGEST = 8
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be others a moment later."""


def default_cache() -> Path:
    """Where blocks are kept unless a flag says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mnemos" / "tokens"


class Remote:
    """The bytes of a URL.

    A block that was read once is on disk: one sparse file per URL, and one of digests, 0 for a block that is not there.
    Processes may share them: a block that is half written, or damaged, has another digest and is fetched again.
    """

    def __init__(self, url: str, cache: Path) -> None:
        """Asks the server for the size. Raises UserError."""
        self.url, self._version = url, ""
        self._local = threading.local()
        self._lock = threading.Lock()
        self._fetching: dict[int, Future[bytes]] = {}
        # Its threads end with the process, whatever they wait for.
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="url")
        first, self.size, self._version = self._request(0, BLOCK)
        name = xxh3_128(f"{url.partition('?')[0]}\0{self.size}\0{self._version}".encode()).hexdigest()
        self._cache = cache
        try:
            cache.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT
            self._data, self._digests = (os.open(cache / f"{name}.{kind}", flags, 0o644) for kind in ("data", "index"))
        except OSError as error:
            raise self._no_cache(error) from error
        if self.size:
            self._store(0, first)

    def read(self, start: int, count: int) -> bytes:
        """Bytes `start` to `start + count`, which lie inside. Raises UserError."""
        numbers = range(start // BLOCK, (start + count - 1) // BLOCK + 1) if count else range(0)
        futures = [(number, self._fetch_later(number)) for number in numbers]
        parts = [self._cached_or_fetched(number) if future is None else future.result() for number, future in futures]
        begin = start - numbers.start * BLOCK
        return b"".join(parts)[begin : begin + count]

    def ahead(self, start: int, count: int) -> None:
        """Begins to fetch what `read` will be asked for."""
        for number in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
            self._fetch_later(number)

    def _fetch_later(self, number: int) -> Future[bytes] | None:
        """The block's request; None where the block is on disk."""
        with self._lock:
            if number in self._fetching:
                return self._fetching[number]
            if self._cached(number) is not None:
                return None
            self._fetching[number] = future = self._pool.submit(self._fetch, number)
        return future

    def _fetch(self, number: int) -> bytes:
        try:
            content, size, version = self._request(number * BLOCK, min(BLOCK, self.size - number * BLOCK))
            if (size, version) != (self.size, self._version):
                raise UserError(
                    f"{self.url} has changed on the server while it was read: start again with --resume never"
                )
            self._store(number, content)
            return content
        finally:
            with self._lock:
                self._fetching.pop(number, None)

    def _cached_or_fetched(self, number: int) -> bytes:
        return self._cached(number) or self._fetch(number)

    def _cached(self, number: int) -> bytes | None:
        """A block from the disk; None where it is not there."""
        try:
            digest = os.pread(self._digests, _DIGEST, number * _DIGEST)
            if len(digest) < _DIGEST or not any(digest):
                return None
            content = os.pread(self._data, min(BLOCK, self.size - number * BLOCK), number * BLOCK)
        except OSError as error:
            raise self._no_cache(error) from error
        return content if xxh3_64(content).digest() == digest else None

    def _store(self, number: int, content: bytes) -> None:
        try:
            os.pwrite(self._data, content, number * BLOCK)
            os.pwrite(self._digests, xxh3_64(content).digest(), number * _DIGEST)
        except OSError as error:
            raise self._no_cache(error) from error

    def _no_cache(self, error: OSError) -> UserError:
        return UserError(
            f"{self._cache} cannot keep blocks of {self.url} ({error.strerror or error}): name another folder with"
            " --data.token-cache"
        )

    def _request(self, start: int, count: int) -> tuple[bytes, int, str]:
        """(bytes, size of the file, its version by the server) of a range, after some tries. Raises UserError."""
        import requests

        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                with self._session().get(
                    self.url,
                    headers={"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"},
                    timeout=TIMEOUT,
                    stream=True,
                ) as answer:
                    if answer.status_code in _PASSING:
                        problem = f"the server answers {answer.status_code}"
                        continue
                    size = self._size(answer, start)
                    content = answer.content
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = brief(error)
                continue
            except requests.RequestException as error:
                raise UserError(f"{self.url} cannot be read ({brief(error)}): check the address") from error
            if len(content) == min(count, size - start):
                headers = answer.headers
                return content, size, headers.get("ETag") or headers.get("Last-Modified") or ""
            problem = f"{len(content)} bytes came of {min(count, size - start)}"
        raise UserError(
            f"{self.url} cannot be read after {ATTEMPTS} tries ({problem}): check the network, or download the file"
            " (the same command goes on from the last checkpoint)"
        )

    def _size(self, answer: Any, start: int) -> int:
        """Bytes of the whole file, by the header of a partial answer. Raises UserError for any other answer."""
        status = answer.status_code
        if status == 200:
            raise UserError(
                f"{self.url} is served whole, without ranges (status 200): download it, and give the file in its place"
            )
        if status == 416 and start == 0:
            raise UserError(f"{self.url} is empty: give a file with tokens")
        if status != 206:
            fix = "check the address" if status in (404, 410) else "check that it may be read from here"
            raise UserError(f"{self.url} cannot be read (status {status}): {fix}")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            shown = brief(answer.headers.get("Content-Range", "none"))
            raise UserError(f"{self.url}: the server answers another range (Content-Range {shown}): download the file")
        return int(found[3])

    def _session(self) -> Any:
        """This thread's, which keeps its connection: sessions of requests are not for several threads."""
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session


def fetch_beside(url: str, suffix: str) -> bytes | None:
    """A small file whose name is that of `url` with a suffix; None where there is none, or it may not be read. Raises
    UserError where the server cannot be reached."""
    import requests

    address, mark, query = url.partition("?")
    try:
        answer = requests.get(f"{address}{suffix}{mark}{query}", timeout=TIMEOUT)
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be read ({brief(error)}): check the address and the network") from error
    return answer.content if answer.status_code == 200 else None


class RemoteTokenFile:
    """A token file behind a URL."""

    is_remote = True

    def __init__(self, url: str, identity: str, layout: Layout, remote: Remote) -> None:
        """Raises UserError when the size does not fit the dtype."""
        self.name, self.identity, self.layout, self._remote = url, identity, layout, remote
        self.size = remote.size
        self.tokens = count_tokens(url, remote.size, layout)

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= self.tokens, (self.name, start, count)
        return np.frombuffer(self._remote.read(*self._bytes(start, count)), DTYPES[self.layout.dtype])

    def ahead(self, start: int, count: int) -> None:
        self._remote.ahead(*self._bytes(start, count))

    def _bytes(self, start: int, count: int) -> tuple[int, int]:
        size = self.layout.itemsize
        return self.layout.offset + start * size, count * size

    def content(self, start: int, count: int) -> bytes:
        return self._remote.read(start, count)
