"""`data prepare`: every document once with its end, the same files whatever the number of processes, whole or not."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.records import RecordLog
from pipeline.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from pipeline.data.tokens import chunks, prepare
from pipeline.data.tokens.chunks import Job, cut
from pipeline.data.tokens.prepare import Prepared
from pipeline.data.tokens.sidecar import read_sidecar
from pipeline.errors import UserError
from tests.data.conftest import local_files, refusal, standard_library_text  # noqa: F401


def run(
    paths: Sequence[Path], out: Path, *, tokenizer: str = "bytes", workers: int = 1, file_bytes: int = 1 << 20,
    skip: bool = False,
) -> list[Prepared]:  # fmt: skip
    found: list[Prepared] = []
    out.mkdir(exist_ok=True)
    source = local_files([str(path) for path in paths], skip=skip)
    job, log = Job(source, tokenizer, False, "uint16"), RecordLog(skip=skip, remedy="correct it")
    prepare.prepare(
        job, load_tokenizer(tokenizer), out, log,
        workers=workers, file_bytes=file_bytes, report=found.append,
    )  # fmt: skip
    return found


def ids_of(found: Sequence[Prepared]) -> list[int]:
    return [int(i) for file in found for i in np.fromfile(file.path, "<u2")]


def expected(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """One document after the other, by the plain tokenizer."""
    return [int(i) for text in texts if text for i in [*tokenizer.encode(text), tokenizer.eos_id]]


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


texts = st.lists(st.text(max_size=40), min_size=1, max_size=40).filter(any)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.integers(1, 200), st.integers(1, 5), st.booleans())
def test_every_document_is_whole_and_in_its_place(
    tmp_path_factory, monkeypatch, found, limit, per_file, packed
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    found = [text.encode("utf-8", "replace").decode() for text in found]
    path = write_lines(folder / "a.jsonl", found)
    if packed:
        packed_path = folder / "a.jsonl.gz"
        packed_path.write_bytes(gzip.compress(path.read_bytes()))
        path = packed_path
    monkeypatch.setattr(chunks, "CHUNK_BYTES", limit)
    monkeypatch.setattr(prepare, "cut", lambda source: cut(source, limit))
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 1)
    files = run([path], folder / "out", file_bytes=per_file)
    assert ids_of(files) == expected(found, ByteTokenizer())
    for file in files:
        content = file.path.read_bytes()
        sidecar = read_sidecar(file.path)
        assert sidecar == file.sidecar
        ids = np.frombuffer(content, "<u2")
        assert sidecar.tokens == len(ids) and sidecar.documents == (ids == 256).sum()
        assert sidecar.sha256 == hashlib.sha256(content).hexdigest()
        assert sum(span.tokens for span in sidecar.spans) == len(ids) and (not len(ids) or ids[-1] == 256)


def test_chunks_are_all_documents_in_order(json_shards: list[str], tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"t{index:02}.txt").write_text("x" * (1 + index * 7))
    source = local_files([*json_shards, str(tmp_path / "t*.txt")])
    for limit in (1, 50, 300, 10**9):
        found = cut(source, limit)
        assert [number for chunk in found for number in chunk] == list(range(len(source)))
    assert len(cut(source, 300)) > 10 and len(cut(source, 10**9)) == 1


def test_processes_change_nothing_and_a_stopped_call_goes_on(tmp_path: Path) -> None:
    corpus = standard_library_text() * 5
    lines = [line for text in corpus for line in text.split("\n\n") if line]
    path = write_lines(tmp_path / "a.jsonl", lines)
    one = run([path], tmp_path / "one")
    two = run([path], tmp_path / "two", workers=2)
    assert len(one) == 2 and [file.sidecar for file in one] == [file.sidecar for file in two]
    assert ids_of(one) == ids_of(two) == expected(lines, ByteTokenizer())
    # Stopped before the second file was complete.
    two[1].path.with_name(two[1].path.name + ".json").unlink()
    two[1].path.write_bytes(b"half")
    before = two[0].path.stat().st_mtime_ns
    again = run([path], tmp_path / "two")
    assert [file.was_there for file in again] == [True, False] and two[0].path.stat().st_mtime_ns == before
    assert ids_of(again) == ids_of(one)
    assert not list((tmp_path / "two").glob(".*partial"))


def test_other_settings_need_another_folder(tmp_path: Path, refusal) -> None:  # noqa: F811
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    run([path], tmp_path / "out")
    write_lines(path, ["one", "too"])
    assert "another corpus, tokenizer or dtype: name another folder" in refusal(run, [path], tmp_path / "out")
    (tmp_path / "out" / "part-00007.npy").write_bytes(b"")
    assert "holds part-00007.npy of another corpus or file size" in refusal(run, [path], tmp_path / "out")


def test_bad_records_stop_or_are_left_out(tmp_path: Path, refusal, caplog) -> None:  # noqa: F811
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nno JSON\n{"text": "two"}\n')
    assert "a.jsonl:2 is not JSON" in refusal(run, [path], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "nothing that looks like a file is left"
    found = run([path], tmp_path / "out", skip=True)
    assert ids_of(found) == expected(["one", "two"], ByteTokenizer())
    assert "a.jsonl:2 is not JSON" in caplog.text


def test_an_end_inside_a_document_is_a_bad_record(tmp_path: Path, monkeypatch, refusal, caplog) -> None:  # noqa: F811
    monkeypatch.setattr(ByteTokenizer, "eos_id", ord("!"))
    path = write_lines(tmp_path / "a.jsonl", ["one", "two!", "three"])
    line = refusal(run, [path], tmp_path / "out")
    assert "has the end-of-document id 33 in its text, by bytes: correct it" in line
    found = run([path], tmp_path / "skipped", skip=True)
    assert ids_of(found) == expected(["one", "three"], ByteTokenizer()), "it is a record that is passed over"
    assert found[0].sidecar.documents == 2 and "in its text, by bytes: passed over" in caplog.text


def test_a_process_that_dies_ends_the_call(tmp_path: Path, monkeypatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def shutdown(self, **_: object) -> None: ...
        def submit(self, *_: object) -> object:
            raise BrokenProcessPool("gone")

    monkeypatch.setattr(chunks, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(prepare, "cut", lambda source: cut(source, 1))
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match="give fewer --workers"):
        run([path], tmp_path / "out", workers=2)


def test_a_tokenizer_of_a_folder_gives_its_ids(tmp_path: Path, bpe_folder: Path) -> None:
    lines = [*standard_library_text()[0].split("\n\n")[:50], "<|endoftext|> is text here"]
    found = run([write_lines(tmp_path / "a.jsonl", lines)], tmp_path / "out", tokenizer=str(bpe_folder))
    assert ids_of(found) == expected(lines, load_tokenizer(str(bpe_folder)))
