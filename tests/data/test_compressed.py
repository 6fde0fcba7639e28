"""gzip and zstd files of text and JSON lines, whole and damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch

from pipeline.data.loader import PackedLoader
from pipeline.data.sources import grouped
from pipeline.data.sources.compressed import Decompressed
from pipeline.data.sources.local import LocalFiles
from pipeline.data.tokenizer import ByteTokenizer
from tests.data.conftest import local_files
from tests.data.test_loader import merged, step
from tests.data.test_sources import order, texts

CODECS = {"gz": "gzip", "zst": "zstd"}
TEXTS = [f"row {row:04} " + "xyz" * (row % 50) for row in range(3000)]
LINES = [json.dumps({"text": text}) + "\n" for text in TEXTS]


def compress(path: Path, content: bytes) -> Path:
    with pyarrow.CompressedOutputStream(str(path), CODECS[path.suffix[1:]]) as file:
        file.write(content)
    return path


def compressed_rows(folder: Path, end: str) -> Path:
    return compress(folder / f"rows.jsonl.{end}", "".join([*LINES[:7], "\n", *LINES[7:]]).encode())


@pytest.fixture
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "GROUP_BYTES", 16 << 10)
    monkeypatch.setattr("pipeline.data.sources.compressed.CHUNK", 1000)


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("end", CODECS)
def test_rows_are_those_of_the_plain_file_in_any_order(tmp_path: Path, end: str) -> None:
    source = local_files([str(compressed_rows(tmp_path, end))])
    assert source.groups is not None and len(source.groups) > 8
    assert texts(source) == TEXTS
    for index in (2999, 0, 1500, 1499, 7, 2000, 2001):
        assert source[index].text == TEXTS[index]
    found = source.open(order(shuffle=True, holdout=0.1))
    held = source.open(order(shuffle=True, holdout=0.1, held_out=True))
    read = [documents.read(1, i) for documents in (found, held) for i in range(documents.count() or 0)]
    assert sorted(document.text for document in read if document) == sorted(TEXTS)


@pytest.mark.usefixtures("_small_groups")
def test_a_group_is_decompressed_about_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = local_files([str(compressed_rows(tmp_path, "gz"))])
    read: list[int] = []
    plain = grouped.CompressedJsonLinesFile.read_group
    monkeypatch.setattr(
        grouped.CompressedJsonLinesFile, "read_group", lambda self, group: read.append(group) or plain(self, group)
    )
    source._readers[0]._cache._limit = 0  # type: ignore[attr-defined]
    source.groups_per_shuffle = 1
    documents = source.open(order(shuffle=True, holdout=0.1))
    for position in range(documents.count() or 0):
        documents.read(0, position)
    assert len(read) == len(set(read))
    started: list[Path] = []
    monkeypatch.setattr(grouped, "Decompressed", lambda path, codec: started.append(path) or Decompressed(path, codec))
    read.clear()
    assert texts(source) == TEXTS and len(started) <= 1, "in natural order the file is read on where it was"


def test_compressed_and_plain_files_lie_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    compress(tmp_path / "b.md.zst", b"marked down")
    compress(tmp_path / "c.py.gz", b"# coding: latin-1\n# \xe9\n")
    compress(tmp_path / "d.json.GZ".lower(), b'{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n') + gzip.compress(b'{"text": "four"}'))
    compress(tmp_path / "empty.txt.gz", b"")
    compress(tmp_path / "blank.jsonl.zst", b"\n\n")
    found = texts(local_files([str(tmp_path)]))
    assert found == ["plain", "marked down", "# coding: latin-1\n# é\n", "one", "two", "three", "four"]
    assert texts(local_files([str(tmp_path / "*.gz")])) == found[2:]
    assert texts(local_files([str(tmp_path / "b.md.zst")])) == ["marked down"]


@pytest.mark.parametrize("end", CODECS)
def test_a_resume_is_exact_and_goes_on_over_another_compression(tmp_path: Path, end: str, caplog: Any) -> None:
    path = compressed_rows(tmp_path, end)

    def loader() -> PackedLoader:
        return PackedLoader(
            local_files([str(path)]), ByteTokenizer(), sequence_length=200, batch_size=2, vocab_size=257, holdout=0.1
        )

    saving = loader()
    for _ in range(20):
        step([saving])
    state = merged([saving])
    following = [step([saving]) for _ in range(10)]
    for again in (False, True):
        if again:
            content = "".join([*LINES[:7], "\n", *LINES[7:]]).encode()
            with pyarrow.CompressedOutputStream(str(path), CODECS[end]) as file:
                for start in range(0, len(content), 50_000):
                    file.write(content[start : start + 50_000])
                    file.flush()
        resumed = loader()
        resumed.load_state_dict(state)
        assert all(torch.equal(step([resumed]), expected) for expected in following)
        assert bool(caplog.records) == again


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("end", CODECS)
@pytest.mark.parametrize("name", ["rows.jsonl", "x.txt"])
def test_what_is_cut_short_is_refused_or_passed_over(
    tmp_path: Path, refusal: Callable[..., str], end: str, name: str
) -> None:
    path = compress(tmp_path / f"{name}.{end}", "".join(LINES).encode())
    path.write_bytes(path.read_bytes()[:-6])

    def read(skip: bool) -> LocalFiles:
        return local_files([str(path)], skip=skip)

    reason = f"{path} is damaged or cut short ("
    if name == "x.txt":
        assert str(read(True)[0].problem).startswith(reason)
        return
    message = refusal(read, False)
    assert message.startswith(reason) and "restore the file, or go on with --data.on-bad-record skip" in message
    source = read(True)
    assert [source[i].text for i in range(len(source) - 1)] == TEXTS[: len(source) - 1]
    assert str(source[len(source) - 1].problem).startswith(reason)
    assert "what follows row" in str(source[len(source) - 1].problem)
    assert len(read(True)) == len(source), "what is left of it is the same each time"


@pytest.mark.parametrize("end", CODECS)
def test_what_is_not_compressed_at_all_is_named(tmp_path: Path, refusal: Callable[..., str], end: str) -> None:
    for name in ("x.jsonl", "x.txt"):
        path = tmp_path / f"{name}.{end}"
        path.write_text("".join(LINES))
        assert f"{path} is damaged or cut short (" in refusal(local_files, [str(path)])
        assert len(local_files([str(path)], skip=True)) == 1


@pytest.mark.parametrize("suffix, module", [("bz2", bz2), ("xz", lzma)])
def test_bzip2_and_xz_are_read_and_their_damage_is_named(tmp_path: Path, refusal, suffix: str, module: Any) -> None:
    lines = [{"text": f"{i} " + "word " * i} for i in range(200)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(module.compress(content))
    (tmp_path / f"b.py.{suffix}").write_bytes(module.compress(b"# coding: latin-1\n# \xe9"))
    assert texts(local_files([str(path)])) == [line["text"] for line in lines]
    assert texts(local_files([str(tmp_path / f"b.py.{suffix}")])) == ["# coding: latin-1\n# é"]
    path.write_bytes(module.compress(content)[:-100])
    assert "is damaged or cut short" in refusal(local_files, [str(path)])
