"""Requests to the servers of token files: by ranges, tried again, and what an answer says of the file's version.

Every request runs in one of CONNECTIONS threads of the process, each with connections of its own, so that neither the
number of files nor that of loaders adds threads or descriptors.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.data.tokens.urls import shown_error, shown_url
from pipeline.data.tokens.workers import Workers, end_with_process
from pipeline.errors import UserError, brief

CONNECTIONS = 16
ATTEMPTS, PAUSE = 5, 1.0
"""Tries of a request, and seconds before the second; each pause is twice the one before."""
TIMEOUT = 30.0
"""Seconds without a byte."""
WORKERS = Workers(CONNECTIONS, "url")
"""What calls the functions below."""
_HOSTS = 2
"""Hosts that a thread stays connected to: that of the URL, and one that it sends to."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be others a moment later."""
_WEAK = "W/"

T = TypeVar("T")
_this_thread = threading.local()
end_with_process(WORKERS)


@dataclass(frozen=True)
class Version:
    """What a server says of a file, by which a change shows."""

    size: int
    """Bytes."""
    etag: str = ""
    """Without the mark of a weak one: servers behind one address differ in it."""
    modified: str = ""
    """Last-Modified."""

    @property
    def is_known(self) -> bool:
        """Whether another file of the same size would have another version."""
        return bool(self.etag or self.modified)

    def may_be(self, other: Version) -> bool:
        """Whether two answers may be of the same file.

        Of several servers behind one address, each may make ETags of its own, or times of its own: one that is equal is
        enough. Where no validator is in both answers, the size decides.
        """
        if self.size != other.size:
            return False
        pairs = ((self.etag, other.etag), (self.modified, other.modified))
        both = [one == another for one, another in pairs if one and another]
        return any(both) or not both


class _IncompleteError(Exception):
    """An answer that ended too early."""


def changed(url: str) -> UserError:
    """What is said when a file is another than it was."""
    return UserError(
        f"{shown_url(url)} has changed on the server while it was read: start the command anew, a run"
        " of training in a folder of its own"
    )


def fetch_range(url: str, start: int, count: int) -> tuple[bytes, Version]:
    """`count` bytes of a file from byte `start` on, fewer at its end, after some tries. Raises UserError."""

    def take(answer: Any) -> tuple[bytes, Version]:
        size = _size(answer, url, start, count)
        wanted = min(count, size - start)
        content = b"".join(answer.iter_content(1 << 16))
        if len(content) != wanted:
            raise _IncompleteError(f"{len(content)} bytes came of {wanted}")
        headers = answer.headers
        return content, Version(size, headers.get("ETag", "").removeprefix(_WEAK), headers.get("Last-Modified", ""))

    return _get(url, {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}, take)


def fetch_whole(url: str, limit: int) -> bytes | None:
    """A small file, after some tries; None where there is none, or it may not be read. Raises UserError where the
    server cannot be reached, or sends more than `limit` bytes."""

    def take(answer: Any) -> bytes | None:
        if answer.status_code != 200:
            # Its body says nothing, and may break off.
            return None
        found = bytearray()
        for part in answer.iter_content(1 << 16):
            found += part
            if len(found) > limit:
                raise UserError(f"{shown_url(url)} is longer than {limit >> 20} MiB: it is no sidecar, so take it away")
        return bytes(found)

    return _get(url, {}, take)


def _get(url: str, headers: Mapping[str, str], take: Callable[[Any], T]) -> T:
    """What `take` makes of the answer."""
    import requests

    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, _IncompleteError)
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with _session().get(url, headers=headers, timeout=TIMEOUT, stream=True) as answer:
                if answer.status_code not in _PASSING:
                    return take(answer)
                problem = f"the server answers {answer.status_code}"
        except passing as error:
            problem = shown_error(error)
        except requests.RequestException as error:
            raise UserError(f"{shown_url(url)} cannot be read ({shown_error(error)}): check the address") from error
    raise UserError(
        f"{shown_url(url)} cannot be read after {ATTEMPTS} tries ({problem}): check the network, or download the file"
        " (the same command goes on from the last checkpoint)"
    )


def _size(answer: Any, url: str, start: int, count: int) -> int:
    """Bytes of the whole file, by the header of a partial answer. Raises UserError for any other answer."""
    status, name = answer.status_code, shown_url(url)
    if status == 200:
        raise UserError(
            f"{name} is served whole, without ranges (status 200): download it, and give the file in its place"
        )
    if status == 416:
        raise changed(url) if start else UserError(f"{name} is empty: give a file with tokens")
    if status != 206:
        fix = "check the address" if status in (404, 410) else "check that it may be read from here"
        raise UserError(f"{name} cannot be read (status {status}): {fix}")
    stated = answer.headers.get("Content-Range", "none")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", stated)
    if found is None or (int(found[1]), int(found[2])) != (start, min(start + count, int(found[3])) - 1):
        raise UserError(
            f"{name}: the server answers another range than bytes {start}-{start + count - 1} (Content-Range"
            f" {brief(stated)}): download the file"
        )
    return int(found[3])


def _session() -> Any:
    """This thread's: sessions of requests are not for several threads."""
    import requests

    if not hasattr(_this_thread, "session"):
        _this_thread.session = session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_connections=_HOSTS, pool_maxsize=1))
    return _this_thread.session
