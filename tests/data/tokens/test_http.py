"""Requests by ranges: what is tried again, what is refused, and when an answer is of the same file."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.data.tokens.http import Version, fetch_range, fetch_whole
from tests.data.tokens.conftest import write
from tests.data.tokens.serving import Server

CONTENT = np.arange(5000, dtype="<u2").tobytes()
Refusal = Callable[..., str]


@pytest.fixture
def url(server: Server) -> str:
    write(server.folder / "a.npy", np.arange(5000))
    return f"{server.url}/a.npy"


def test_a_range_and_the_version(server: Server, url: str) -> None:
    assert fetch_range(url, 0, 1024) == (CONTENT[:1024], Version(10_000, '"1"'))
    server.tags, server.modified = ['W/"1"'], "now"
    assert fetch_range(url, 9000, 1024) == (CONTENT[9000:], Version(10_000, '"1"', "now"))


def test_a_server_may_fail_for_a_moment(server: Server, url: str) -> None:
    server.statuses, server.cut = [503, 500], 3
    assert fetch_range(url, 0, 1024)[0] == CONTENT[:1024]
    server.statuses = [503, 429, 200]
    assert fetch_whole(url, 10_000) == CONTENT


def test_what_cannot_be_read_is_said_in_one_line_without_credentials(
    server: Server, url: str, refusal: Refusal
) -> None:
    said = []

    def refused(part: str, address: str = url) -> None:
        said.append(refusal(fetch_range, f"{address}?key=secret", 0, 1024))
        assert part in said[-1] and said[-1].count("?[") >= 1

    server.statuses = [503] * 5
    refused("cannot be read after 5 tries (the server answers 503): check the network")
    server.cut = 5
    refused("bytes came of 1024")
    refused("(status 404): check the address", f"{server.url}/b.npy")
    server.statuses = [403]
    refused("(status 403): check that it may be read from here")
    refused("check the network", "http://user:secret@127.0.0.1:9/a.npy")
    refused("check the address", "http://user:secret@:80:80/a.npy")
    for shift in (-1, 1):
        server.shift = shift
        refused(f"another range than bytes 0-1023 (Content-Range bytes 0-{1023 + shift}/10000): download the file")
    assert not any("secret" in line or "user" in line for line in said)


def test_a_small_file_is_fetched_whole_or_not_at_all(server: Server, url: str, refusal: Refusal) -> None:
    assert fetch_whole(url, 10_000) == CONTENT
    assert "is longer than 0 MiB" in refusal(fetch_whole, url, 9_999)
    assert fetch_whole(f"{server.url}/b.npy", 10_000) is None
    server.statuses = [403]
    assert fetch_whole(url, 10_000) is None
    server.statuses, server.broken = [404], 1
    assert fetch_whole(f"{server.url}/b.npy", 10_000) is None, "whose body breaks off"
    server.statuses = [502] * 5
    assert "after 5 tries (the server answers 502)" in refusal(fetch_whole, url, 10_000)


def test_one_validator_in_common_is_enough() -> None:
    known = Version(1, "a", "b")
    assert all(known.may_be(other) for other in (known, Version(1, "a", "c"), Version(1, "c", "b"), Version(1)))
    assert not any(known.may_be(other) for other in (Version(2, "a", "b"), Version(1, "c", "d"), Version(1, "c")))
    every = [Version(1, *words) for words in itertools.product(("", "a", "b"), repeat=2)]
    assert all(one.may_be(other) == other.may_be(one) for one in every for other in every)
    assert [version.is_known for version in (Version(1), Version(1, "a"), Version(1, "", "b"))] == [False, True, True]
