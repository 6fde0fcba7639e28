"""A token file behind a URL: range requests, some blocks at once, each kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.tokens import blocks
from pipeline.data.tokens.blocks import blocks_of
from pipeline.data.tokens.files import DTYPES, Layout, count_tokens
from pipeline.data.tokens.http import WORKERS, Version, changed, fetch_range, fetch_whole
from pipeline.data.tokens.sidecar import Sidecar, parse_sidecar
from pipeline.data.tokens.urls import beside, shown_url
from pipeline.files.json_file import parse_json

SIDECAR_BYTES = 64 << 20
"""No sidecar is longer."""


@dataclass(frozen=True)
class Served:
    """What its server says of a URL, found once for all ranks and loaders."""

    version: Version
    sidecar: Sidecar | None
    """Without its spans, of which there may be as many as the text had files."""


def look_up(urls: Iterable[str], cache: Path) -> dict[str, Served]:
    """What the servers say of URLs, many asked at once. The first block of each is on disk then. Raises UserError for
    the first that cannot be read."""
    futures = {url: WORKERS.submit(functools.partial(_look_up, url, cache)) for url in dict.fromkeys(urls)}
    try:
        return {url: future.result() for url, future in futures.items()}
    finally:
        for future in futures.values():
            future.cancel()


def _look_up(url: str, cache: Path) -> Served:
    first, version = fetch_range(url, 0, blocks.BLOCK)
    if version.is_known:
        blocks_of(url, version, cache).put(0, first)
    sidecar = _fetch_sidecar(url)
    return Served(version, sidecar and dataclasses.replace(sidecar, spans=()))


def fetch_sidecar(url: str) -> Sidecar | None:
    """The sidecar beside a URL; None without one. Raises UserError for one that is damaged, and where the server
    cannot be reached."""
    return fetch_sidecars([url])[url]


def fetch_sidecars(urls: Iterable[str]) -> dict[str, Sidecar | None]:
    """The sidecars beside URLs, many asked for at once. As `fetch_sidecar`."""
    futures = {url: WORKERS.submit(functools.partial(_fetch_sidecar, url), urgent=True) for url in dict.fromkeys(urls)}
    try:
        return {url: future.result() for url, future in futures.items()}
    finally:
        for future in futures.values():
            future.cancel()


def _fetch_sidecar(url: str) -> Sidecar | None:
    address = beside(url, ".json")
    content = fetch_whole(address, SIDECAR_BYTES)
    # A server may answer any name with a page of its own.
    if content is None or not content.lstrip().startswith(b"{"):
        return None
    try:
        found = parse_json(content)
    except ValueError:
        found = None
    return parse_sidecar(found, shown_url(address))


class Remote:
    """The bytes of a URL, whose blocks are on disk once they were read."""

    def __init__(self, url: str, cache: Path, version: Version) -> None:
        """`version`: what the server has said of it. Raises UserError."""
        self.url, self.size, self._version = url, version.size, version
        self._blocks = blocks_of(url, version, cache)
        self._lock = threading.Lock()
        self._fetching: dict[int, Future[bytes]] = {}

    def read(self, start: int, count: int) -> bytes:
        """Bytes `start` to `start + count`, which lie inside. Raises UserError."""
        numbers = _numbers(start, count)
        parts = [(number, self._blocks.get(number)) for number in numbers]
        futures = {number: self._fetch_later(number, urgent=True) for number, part in parts if part is None}
        content = b"".join(futures[number].result() if part is None else part for number, part in parts)
        begin = start - numbers.start * blocks.BLOCK
        return content[begin : begin + count]

    def ahead(self, start: int, count: int) -> None:
        """Begins to fetch what `read` will be asked for."""
        for number in _numbers(start, count):
            if not self._blocks.has(number):
                self._fetch_later(number, urgent=False)

    def _fetch_later(self, number: int, *, urgent: bool) -> Future[bytes]:
        with self._lock:
            future = self._fetching.get(number)
            if future is None:
                future = WORKERS.submit(functools.partial(self._fetch, number), urgent=urgent)
                self._fetching[number] = future
            elif urgent:
                WORKERS.hurry(future)
        return future

    def _fetch(self, number: int) -> bytes:
        try:
            # Another process, or this one between a look at the disk and the request, may have stored it.
            content = self._blocks.get(number)
            if content is None:
                start = number * blocks.BLOCK
                content, version = fetch_range(self.url, start, min(blocks.BLOCK, self.size - start))
                if not version.may_be(self._version):
                    raise changed(self.url)
                self._blocks.put(number, content)
            return content
        finally:
            with self._lock:
                self._fetching.pop(number, None)


_open_here: weakref.WeakValueDictionary[tuple[str, Path, Version], Remote] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def open_remote(url: str, cache: Path, version: Version) -> Remote:
    """The one of this process: loaders of training and evaluation have it in common. Raises UserError."""
    with _opening:
        found = _open_here.get((url, cache, version))
        if found is None:
            _open_here[url, cache, version] = found = Remote(url, cache, version)
        return found


def _numbers(start: int, count: int) -> range:
    """The blocks that bytes lie in."""
    return range(start // blocks.BLOCK, (start + count - 1) // blocks.BLOCK + 1) if count else range(0)


class RemoteTokenFile:
    """A token file behind a URL."""

    is_remote = True

    def __init__(self, url: str, identity: str, layout: Layout, remote: Remote) -> None:
        """Raises UserError when the size does not fit the dtype."""
        self.name, self.url, self.identity, self.layout, self._remote = shown_url(url), url, identity, layout, remote
        self.size = remote.size
        self.tokens = count_tokens(self.name, remote.size, layout)

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

    def content_ahead(self, start: int, count: int) -> None:
        """Begins to fetch what `content` will be asked for."""
        self._remote.ahead(start, count)
