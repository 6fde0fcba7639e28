"""Random mutations of files of every format: a reader gives documents, or one line that names the file."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.cli import main
from pipeline.data.loader import PackedLoader
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from tests.data.conftest import local_files
from tests.mutations import mutations

ROOT = Path(__file__).resolve().parents[2]
ROWS = [f"row {row} é " + "words and words " * (row % 5) for row in range(40)]


def text() -> bytes:
    return "\n".join(ROWS).encode()


def python() -> bytes:
    return b"# -*- coding: utf-8 -*-\n" + b"".join(b"x%d = 'caf\xc3\xa9'\n" % row for row in range(20))


def json_lines() -> bytes:
    rows = ({"text": row, "id": number, "meta": {"tags": [1, None, "a"]}} for number, row in enumerate(ROWS))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": ROWS, "id": range(len(ROWS))})
    pyarrow.parquet.write_table(table, sink, row_group_size=10, compression="snappy")
    return bytes(sink.getvalue().to_pybytes())


def packed(content: bytes, codec: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as file:
        file.write(content)
    return bytes(sink.getvalue().to_pybytes())


FORMATS: dict[str, tuple[bytes, int]] = {
    "x.txt": (text(), 80),
    "x.py": (python(), 80),
    "x.jsonl": (json_lines(), 200),
    "x.parquet": (parquet(), 200),
    "x.jsonl.gz": (json_lines(), 80),
    "x.jsonl.zst": (json_lines(), 80),
    "x.txt.gz": (text(), 40),
    "x.md.zst": (text(), 40),
}
"""A valid content of each format and how many mutants of it are read: 800 in all."""
CODECS = {".gz": "gzip", ".zst": "zstd"}


def mutants(name: str, seed: int = 11) -> Iterator[tuple[str, bytes]]:
    """Of a compressed file in turn the content and the archive."""
    valid, count = FORMATS[name]
    codec = CODECS.get(Path(name).suffix)
    if codec is None:
        yield from mutations(valid, count, seed)
        return
    inner = ((f"{done}, packed", packed(content, codec)) for done, content in mutations(valid, count // 2, seed))
    outer = mutations(packed(valid, codec), count - count // 2, seed)
    yield from itertools.chain.from_iterable(zip(inner, outer, strict=True))


def refused(done: str, read: Callable[[], None]) -> str | None:
    """What a UserError says; None where the file is read. Anything else fails."""
    try:
        read()
    except UserError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{done}: ended by {type(error).__name__}: {error}") from error
    return None


def read_all(path: Path, skip: bool) -> None:
    """Trains on the file for some steps, then reads every document of both sides."""
    source = local_files([str(path)], skip=skip)
    options = {"sequence_length": 64, "batch_size": 2, "vocab_size": 257, "holdout": 0.2, "skip_bad_records": skip}
    for held_out in (False, True):
        loader = PackedLoader(source, ByteTokenizer(), held_out=held_out, **options)  # type: ignore[arg-type]
        for _ in range(8):
            loader.next_step()
        json.dumps(loader.state_dict())
    for index in range(len(source)):
        source[index].text.encode()


def read_stream(kind: str, path: Path, skip: bool) -> None:
    """The same for some steps of a streamed data set."""
    source = HuggingFaceStream(kind, data_files=[str(path)], shuffle_buffer=5, skip=skip)
    options = {"batch_size": 2, "vocab_size": 257, "holdout": 0.2, "skip_bad_records": skip}
    loader = PackedLoader(source, ByteTokenizer(), sequence_length=64, **options)  # type: ignore[arg-type]
    for _ in range(12):
        loader.next_step()
    json.dumps(loader.state_dict())


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutant_is_read_or_refused_by_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.compressed.CHUNK", 500)
    path, read = tmp_path / name, 0
    for (done, content), skip in zip(mutants(name), itertools.cycle((False, False, True)), strict=False):
        path.write_bytes(content)
        said = refused(done, lambda skip=skip: read_all(path, skip))
        read += said is None
        assert said is None or (str(path) in said and "\n" not in said and len(said) < 2000), (done, said)
    assert read > 5, "the mutations leave some files that can be read"


@pytest.mark.parametrize(("kind", "name"), [("json", "x.jsonl"), ("parquet", "x.parquet"), ("json", "x.jsonl.gz")])
def test_a_streamed_mutant_is_read_or_refused(tmp_path: Path, kind: str, name: str) -> None:
    path, read = tmp_path / name, 0
    for (done, content), skip in zip(itertools.islice(mutants(name), 25), itertools.cycle((False, True)), strict=False):
        path.write_bytes(content)
        said = refused(done, lambda skip=skip: read_stream(kind, path, skip))
        read += said is None
        assert said is None or ("\n" not in said and len(said) < 2000), (done, said)
    assert read > 2


CHECKED = ["x.txt", "x.jsonl", "x.jsonl", "x.parquet", "x.parquet", "x.jsonl.gz", "x.jsonl.zst", "x.jsonl"]


@pytest.mark.parametrize("number", range(len(CHECKED)))
def test_the_check_of_a_mutant_ends_with_0_or_2(
    tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = tmp_path / CHECKED[number]
    path.write_bytes(next(itertools.islice(mutants(path.name), 10 * number + 3, None))[1])
    words = ["check", "miras_tiny", "--data.path", str(path), "--data.holdout", "0.3"]
    words += ["--data.on-bad-record", "skip"] if number % 3 == 2 else []
    check(lambda: main([*words, "--output-dir", str(tmp_path / "out")]), capsys, path)


def check(run: Callable[[], int], capsys: pytest.CaptureFixture[str], path: Path) -> None:
    code = run()
    said = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in said
    assert code == 0 or str(path) in said


@pytest.mark.parametrize(("name", "number"), [("x.jsonl", 5), ("x.parquet", 8)])
def test_the_command_itself_ends_with_0_or_2(tmp_path: Path, name: str, number: int) -> None:
    path = tmp_path / name
    path.write_bytes(next(itertools.islice(mutants(name), number, None))[1])
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "check",
        "miras_tiny",
        "--data.path",
        str(path),
        "--data.holdout",
        "0.3",
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    assert done.returncode == 0 or str(path) in done.stderr
