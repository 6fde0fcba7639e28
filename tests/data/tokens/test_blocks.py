"""Blocks of URLs on disk: what is kept, for which file and version, and what processes have in common."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from tests.data.tokens.conftest import SIZE, open_url
from tests.data.tokens.serving import Server


def test_a_damaged_block_of_the_cache_is_fetched_again(server: Server, content: bytes, tmp_path: Path) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    assert open_url(url, cache).read(0, SIZE) == content
    (kept,) = cache.iterdir()
    spoilt = bytearray(kept.read_bytes())
    spoilt[3000] ^= 1
    kept.write_bytes(spoilt)
    before = len(server.blocks())
    found = open_url(url, cache)
    found.ahead(100, 0)
    assert found.read(100, 0) == b"" and found.read(1000, 5000) == content[1000:6000]
    assert server.blocks()[before:] == ["bytes=0-1023", "bytes=2048-3071"]
    kept.unlink()
    assert found.read(1000, 5000) == content[1000:6000], "the cache may be emptied while it is in use"


def test_files_that_may_be_others_have_blocks_of_their_own(server: Server, content: bytes, tmp_path: Path) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    contents = [content, content[::-1]]
    versions = [
        (url, '"1"', ""),
        (url, '"2"', ""),
        (f"{url}?version=3", '"2"', ""),  # the query may choose the file
        (url, '"2"', "now"),
        (url, "", "now"),
        (url, "", "then"),
        (url, "", ""),
        (url, "", ""),
    ]
    for number, (name, tag, server.modified) in enumerate(versions):
        server.tags = [tag]
        (server.folder / "a.npy").write_bytes(contents[number % 2])
        assert open_url(name, cache).read(0, SIZE) == contents[number % 2]
    assert len(list(cache.iterdir())) == 6, "what has no validator is not kept"


def test_a_url_that_is_signed_anew_is_the_same_file(server: Server, content: bytes, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for number in range(2):
        url = f"{server.url}/a.npy?versionId=3&X-Amz-Date={number}&X-Amz-Signature={number}"
        assert open_url(url, cache).read(0, SIZE) == content
    assert len(server.blocks()) == -(-SIZE // 1024) + 1 and len(list(cache.iterdir())) == 1


def test_without_validators_a_run_reads_each_block_once(server: Server, content: bytes, tmp_path: Path) -> None:
    server.tags = [""]
    found = open_url(f"{server.url}/a.npy", tmp_path / "cache")
    before = len(server.blocks())
    for _ in range(2):
        assert found.read(10, SIZE - 10) == content[10:]
    found.ahead(0, SIZE)
    assert len(server.blocks()) - before == -(-SIZE // 1024)


READ = """
import sys
from pathlib import Path
from pipeline.data.tokens import blocks
from pipeline.data.tokens.remote import Remote, RemoteTokenFile, look_up
blocks.BLOCK = 1024
url, cache, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
sys.stdout.buffer.write(Remote(url, cache, look_up([url], cache)[url].version).read(0, size))
"""


def test_two_processes_share_a_cache(server: Server, content: bytes, tmp_path: Path) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    child = subprocess.Popen(
        [sys.executable, "-c", READ, url, str(cache), str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    # Both ask for the first block before either has it.
    first = threading.Barrier(2)
    passed = threading.Event()

    def gate(name: str) -> None:
        if not passed.is_set() and name == "a.npy":
            first.wait(30)
            passed.set()

    server.gate = gate
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    assert open_url(url, cache).read(0, SIZE) == content
    theirs, _ = child.communicate(timeout=60)
    assert theirs == content and child.returncode == 0
    asked = len(server.blocks())
    assert open_url(url, cache).read(0, SIZE) == content and len(list(cache.iterdir())) == 1
    assert len(server.blocks()) == asked + 1
