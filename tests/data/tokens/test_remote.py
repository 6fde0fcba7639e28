"""Token files behind a URL, by a server of this machine: ranges alone are asked for, once, and kept."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.data.build import list_data
from pipeline.data.tokens import remote
from pipeline.data.tokens.blocks import cache_folder
from pipeline.data.tokens.http import CONNECTIONS, WORKERS
from pipeline.data.tokens.remote import RemoteTokenFile, look_up
from pipeline.data.tokens.sidecar import Sidecar, Span
from pipeline.files.output import write_json
from tests.data.tokens.conftest import IDS, SIZE, config, open_loader, open_url, write
from tests.data.tokens.serving import Server


def wait_until(condition, seconds: float = 10) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_windows_are_those_of_the_file_and_are_fetched_once(server: Server, file: str, tmp_path: Path) -> None:
    options = {"token_cache": str(tmp_path / "cache"), "batch_size": 8}
    url = f"{server.url}/a.npy?key=b"
    local, far = (open_loader([name], **options) for name in (file, url))
    for _ in range(80):
        for one, other in zip(local.next_step(), far.next_step(), strict=True):
            assert one.input_ids.equal(other.input_ids)
    fetched = server.blocks()
    assert len(fetched) == len(set(fetched)) == -(-SIZE // 1024) and None not in fetched
    again = open_loader([url], **options)
    again.next_step()
    assert server.blocks()[len(fetched) :] == ["bytes=0-1023"], "the version alone is asked for"
    # The same content in either place is the same data.
    again.load_state_dict(local.state_dict())
    local.load_state_dict(far.state_dict())


def test_training_and_evaluation_read_a_url_in_common_as_rank_0_found_it(
    server: Server, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/a.npy"
    spans = (Span("a.txt", 1, 5000),)
    beside = Sidecar("uint16", 5000, 1, 260, 256, "bytes", "", "", spans)
    write_json(server.folder / "a.npy.json", beside.to_json())
    options = {"token_cache": str(tmp_path / "cache"), "holdout": 0.2}
    listed = list_data(config([url], **options), ask_servers=True)
    ((name,),) = (source.files for source in listed.training)
    assert name.served is not None and name.served.version.size == SIZE and name.served.sidecar is not None
    assert name.served.sidecar.spans == () and server.asked == [("a.npy", "bytes=0-1023"), ("a.npy.json", None)]
    monkeypatch.setattr("pipeline.data.build.list_data", lambda config: listed)
    loaders = [open_loader([url], held_out=held_out, **options) for held_out in (False, True) for _ in range(2)]
    assert len({loader.sources[0].files[0]._remote for loader in loaders}) == 1
    assert len(server.asked) == len(set(server.asked)), "nobody asks again"


def test_what_will_be_read_is_fetched_before(server: Server, file: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    loader = open_loader([f"{server.url}/a.npy"], token_cache=cache, batch_size=1, shuffle=False, held_out=True,
                         held_out_tokens=(f"{server.url}/a.npy",))  # fmt: skip
    loader.next_step()
    # 1 + 64 windows of 16 ids of 2 bytes.
    wanted = {f"bytes={start}-{start + 1023}" for start in range(0, 65 * 32, 1024)}
    wait_until(lambda: wanted <= {asked for _, asked in server.asked})


def test_servers_behind_one_address_may_have_tags_of_their_own(
    server: Server, content: bytes, tmp_path: Path, refusal
) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    server.tags = ['"1"', 'W/"1"', '"1"', 'W/"1"']
    assert open_url(url, cache).read(0, SIZE) == content
    server.tags, server.modified = [f'"{node}"' for node in range(20)], "Sat, 28 Nov 2026 08:00:00 GMT"
    assert open_url(url, cache).read(0, SIZE) == content
    found = open_url(url, tmp_path / "other")
    server.tags, server.modified = ['"21"'], "Sat, 28 Nov 2026 09:00:00 GMT"
    assert "has changed on the server while it was read" in refusal(found.read, 4096, 10)


def test_a_file_that_shrinks_or_grows_has_changed(server: Server, file: str, tmp_path: Path, refusal) -> None:
    found = open_url(f"{server.url}/a.npy", tmp_path / "cache")
    for length in (4990, 1000, 6000):
        write(Path(file), IDS[:length] if length < 5000 else np.zeros(length))
        assert "has changed on the server while it was read" in refusal(found.read, 4096, 10)


def test_what_cannot_be_read_is_said_in_one_line(server: Server, file: str, tmp_path: Path, refusal) -> None:
    url, cache = f"{server.url}/a.npy", tmp_path / "cache"
    write(server.folder / "empty.npy", [])
    assert "is empty" in refusal(open_url, f"{server.url}/empty.npy", cache)
    (tmp_path / "file").write_text("")
    assert "name another folder with --data.token-cache" in refusal(open_url, url, tmp_path / "file")
    server.tags = [""]
    assert "name another folder with --data.token-cache" in refusal(open_url, url, tmp_path / "file")
    many = [f"{server.url}/none-{number}.npy" for number in range(100)]
    assert f"{server.url}/none-0.npy cannot be read (status 404)" in refusal(look_up, many, cache)


def test_a_url_without_ranges_ends_in_one_line_and_exit_code_2(
    server: Server, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "mnemos" / "tokens"
    server.ranges = False
    assert main(["data", "inspect", f"{server.url}/a.npy?key=secret", "--tokenizer", "bytes"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is served whole, without ranges (status 200): download it" in error
    assert "secret" not in error


def test_the_sidecar_of_a_url_is_read(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal) -> None:
    write(server.folder / "wide.npy", IDS, "uint32")
    beside = server.folder / "wide.npy.json"
    write_json(beside, Sidecar("uint32", 5000, 1, 260, 256, "bytes", "", "").to_json())
    url, options = f"{server.url}/wide.npy?key=secret", {"token_cache": str(tmp_path), "shuffle": False}
    server.statuses = [206, 503]
    loader = open_loader([url], **options)
    assert loader.next_step()[0].input_ids.flatten().tolist() == IDS[:32].tolist()
    assert "secret" not in loader.describe() + loader.sources[0].files[0].name
    monkeypatch.setattr(remote, "SIDECAR_BYTES", 1 << 20)
    beside.write_bytes(bytes(1 + (1 << 20)))
    message = refusal(open_loader, [url], **options)
    assert "wide.npy.json?[" in message and "is longer than 1 MiB" in message and "secret" not in message
    beside.write_text('{"format": ')
    assert "is no sidecar of a token file" in refusal(open_loader, [url], **options)
    beside.write_text("<html>not found</html>")
    assert len(open_loader([url], token_dtype="uint32", **options).sources) == 1


def test_many_urls_take_few_connections_threads_and_descriptors(server: Server, tmp_path: Path, refusal) -> None:
    count, ids = 300, 32
    every = np.arange(count * ids) % 250
    for number in range(count):
        write(server.folder / f"{number}.npy", every[number * ids :][:ids])
    # So that at least two requests are under way at a time.
    server.gate = lambda name: time.sleep(0.001)
    urls = [f"{server.url}/{number}.npy" for number in range(count)]
    options = {"token_cache": str(tmp_path / "cache"), "shuffle": False, "batch_size": 30, "held_out_tokens": urls}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Server and client are in this process: two sockets and two files for each of 16 connections.
    few = len(os.listdir("/proc/self/fd")) + 4 * CONNECTIONS + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        training, held_out = (open_loader(urls, held_out=held_out, **options) for held_out in (False, True))
        training.state_dict()
        read = [loader.next_step()[0].input_ids.flatten() for loader in (training, held_out) for _ in range(20)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for loader in range(2):
        assert np.concatenate(read[loader * 20 :][:20]).tolist() == every.tolist()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("url-")]
    assert len(threads) <= CONNECTIONS and 2 <= server.most < 2 * CONNECTIONS
    assert all(len(server.blocks(f"{number}.npy")) == 2 for number in range(0, count, 50)), "once a loader"


def test_ranks_begin_at_different_files_for_the_fingerprint(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"{server.url}/{number}.npy" for number in range(4)]
    for number in range(4):
        write(server.folder / f"{number}.npy", np.full(100, number))
    begun: list[int] = []
    monkeypatch.setattr(
        RemoteTokenFile, "content_ahead", lambda file, start, count: begun.append(urls.index(file.name))
    )
    found = []
    for rank in (0, 1):
        loader = open_loader(urls, rank=rank, ranks=2, token_cache=str(tmp_path / "cache"))
        found.append(loader.state_dict()["fingerprint"])
    assert begun == [0, 1, 2, 3, 2, 3, 0, 1] and found[0] == found[1]


END = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pipeline.data.tokens.http import Version
from pipeline.data.tokens.remote import Remote
found = Remote(sys.argv[1], Path(sys.argv[2]), Version(1 << 30, "1"))
found.ahead(0, 1 << 30)
step = ThreadPoolExecutor(1).submit(found.read, 1 << 20, 100)
sys.stdin.readline()
print(time.time(), flush=True)
"""


def test_a_process_ends_while_blocks_are_awaited(server: Server, file: str, tmp_path: Path) -> None:
    stopped = threading.Event()
    server.gate = lambda name: bool(stopped.wait(60))  # type: ignore[assignment,return-value]
    child = subprocess.Popen(
        [sys.executable, "-c", END, f"{server.url}/a.npy", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(server.asked) >= CONNECTIONS, 60)
        said, problem = child.communicate("\n", timeout=20)
        seconds = time.time() - float(said)
    finally:
        stopped.set()
    assert child.returncode == 0 and not problem and seconds < 5
    assert WORKERS.submit(lambda: 1).result() == 1
