"""Local sources: every format, the hold-out, the order, refusals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PackedLoader
from pipeline.data.sources.base import Order, Permutation, digest, held_out_rows, row_hashes
from pipeline.data.sources.indexed import IndexedDocuments
from pipeline.data.sources.local import LocalFiles, standard_library
from pipeline.data.tokenizer import ByteTokenizer
from tests.data.conftest import MemorySource, local_files, rewrite


def order(**changes: object) -> Order:
    plain = {"streams": 1, "local_streams": range(1), "held_out": False, "holdout": 0.2, "shuffle": False, "seed": 0}
    return Order(**(plain | changes))  # type: ignore[arg-type]


def texts(source: LocalFiles) -> list[str]:
    return [source[i].text for i in range(len(source))]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, rows: list[str | None], group: int = 4, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, **columns}), path, row_group_size=group)
    return path


def epoch(documents: IndexedDocuments, number: int) -> list[str]:
    found = (documents.read(number, position) for position in range(documents.count() + 3))
    return [document.text for document in found if document is not None]


# --- formats


def test_standard_library_is_sources_without_tests() -> None:
    source = standard_library()
    names = [identity for identity, _ in source.parts()]
    assert len(names) > 300 and names == sorted(names)
    assert {"argparse.py", "asyncio/base_events.py"} <= set(names)
    assert not any(part in ("test", "tests", "site-packages", "__pycache__") for n in names for part in n.split("/"))
    assert all(rows == 1 for _, rows in source.parts())
    index = names.index("argparse.py")
    assert source[index].text == Path(source[index].name).read_text(encoding="utf-8")


def test_text_files_in_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b/two.md", "a/one.txt", "c.py", "a/skip.csv", ".hidden/x.txt", "__pycache__/y.py", "empty.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else f"# {name}")
    expected = ["# a/one.txt", "# b/two.md", "# c.py"]
    assert texts(local_files([str(tmp_path)])) == expected
    assert texts(local_files([str(tmp_path / "*" / "*.*")])) == expected[:2]
    assert texts(local_files([str(tmp_path / "**")])) == expected
    both = local_files([str(tmp_path / "c.py"), str(tmp_path)])
    assert texts(both) == ["# c.py", "# a/one.txt", "# b/two.md"], "a file named twice counts once"


def test_decoding(tmp_path: Path) -> None:
    write(tmp_path / "bom.txt", b"\xef\xbb\xbfwith mark\r\n")
    write(tmp_path / "latin.py", b"# -*- coding: latin-1 -*-\n# \xe9\n")
    write(tmp_path / "broken.txt", b"ab\xffcd")
    write(tmp_path / "unknown.py", b"# coding: no-such\n")
    source = local_files([str(tmp_path)])
    read = dict(zip(("bom", "broken", "latin", "unknown"), texts(source), strict=True))
    assert read["bom"] == "with mark\r\n"
    assert read["latin"].endswith("# é\n")
    assert read["broken"] == "ab\ufffdcd"
    assert read["unknown"] == "# coding: no-such\n"
    marked = [Path(source[i].name).name for i in range(len(source)) if source[i].undecodable]
    assert marked == ["broken.txt", "unknown.py"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_json_lines(tmp_path: Path, ending: str, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.readers._SCAN_BLOCK", 7)  # lines and blank lines cross the blocks
    rows = ["one", "", "zwei é", "x" * 50, "drei\nlines"]
    lines = [json.dumps({"id": i, "text": row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    lines.insert(2, "")
    path = write(tmp_path / "rows.jsonl", ending.join(lines) + last)
    source = local_files([str(path)])
    assert [text for text in texts(source) if text] == [row for row in rows if row]
    assert [source[i].text for i in reversed(range(len(source)))] == texts(source)[::-1]


def test_json_text_without_an_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '{"text": "half \\ud83e whole \\ud83e\\udde0"}\n{"text": null}\n')
    assert texts(local_files([str(path)])) == ["half \ufffd whole \U0001f9e0", ""]


def test_parquet_rows(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(10)]
    write_parquet(tmp_path / "a.parquet", [*rows, None], other=list(range(11)))
    write_parquet(tmp_path / "b.parquet", ["last"], group=1)
    source = local_files([str(tmp_path)])
    assert texts(source) == [*rows, "", "last"]
    assert source.groups is not None and source.groups.tolist() == [0, 4, 8, 11, 12]
    dictionary = pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()})
    pyarrow.parquet.write_table(dictionary, tmp_path / "c.parquet")
    assert texts(local_files([str(tmp_path / "c.parquet")])) == ["x", "y", "x"]


def test_parquet_row_groups_are_read_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data.sources.grouped import ParquetFile

    reads: Counter[tuple[str, int]] = Counter()
    plain = ParquetFile.read_group

    def counted(self: ParquetFile, group: int) -> object:
        reads[self.path.name, group] += 1
        return plain(self, group)

    monkeypatch.setattr(ParquetFile, "read_group", counted)
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", [f"{name} {i}" for i in range(100)], group=5)
    write(tmp_path / "c.txt", "text")
    documents = local_files([str(tmp_path)]).open(order(shuffle=True))
    first, second = epoch(documents, 0), epoch(documents, 1)
    assert len(reads) == 40 and max(reads.values()) == 1, "the cache holds this small file"
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == len(first)
    source = local_files([str(tmp_path)])
    source._readers[0]._cache._limit = 0  # type: ignore[attr-defined]
    source.groups_per_shuffle = 1
    reads.clear()
    epoch(source.open(order(shuffle=True)), 0)
    assert max(reads.values()) == 1, "one group at a time needs no cache"


def test_formats_mix(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.jsonl", '{"text": "b"}\n{"text": "c"}\n')
    write_parquet(tmp_path / "d.parquet", list("defgh"))
    write(tmp_path / "e.txt", "i")
    source = local_files([str(tmp_path)])
    assert texts(source) == list("abcdefghi")
    assert source.groups is not None and source.groups.tolist() == [0, 3, 7, 8, 9]
    documents = source.open(order(shuffle=True, holdout=0.3))
    held = source.open(order(shuffle=True, holdout=0.3, held_out=True))
    assert sorted(epoch(documents, 3) + epoch(held, 5)) == list("abcdefghi")


# --- order and hold-out


@given(st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_permutation_is_one(size: int, key: int) -> None:
    permute = Permutation(size, "test", key)
    assert sorted(map(permute, range(size))) == list(range(size))


def test_permutation_mixes_and_stays_the_same() -> None:
    ranks = [Permutation(1000, 7, 1)(i) for i in range(1000)]
    assert abs(float(np.corrcoef(ranks, range(1000))[0, 1])) < 0.1
    assert ranks != [Permutation(1000, 7, 2)(i) for i in range(1000)]
    # Cursors of older checkpoints point into these orders: the numbers must never change.
    assert ranks[:4] == [519, 943, 489, 415]
    assert digest("a", 1) == 0xCD85A665880B4301


@given(st.integers(2, 400), st.floats(0.05, 0.9), st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sides_are_disjoint_and_complete(size: int, holdout: float, shuffle: bool, seed: int) -> None:
    source = MemorySource([str(i) for i in range(size)])
    held = set(map(str, held_out_rows(source.parts(), holdout)))
    if not 0 < len(held) < size:
        return
    for streams in (1, 3):
        sides = []
        for held_out in (False, True):
            choice = order(streams=streams, holdout=holdout, shuffle=shuffle, seed=seed, held_out=held_out)
            documents = IndexedDocuments(source, choice)
            side = epoch(documents, seed)
            assert len(side) == documents.count() and sorted(side) == sorted(d.text for d in documents.scan())
            sides.append(side)
        assert set(sides[1]) == held, "neither seed nor ranks change what is held out"
        assert sorted(sides[0] + sides[1]) == sorted(source.texts)


def test_hold_out_follows_the_identity(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / "here" / f"{i:02}.txt", f"text {i}")
        write(tmp_path / "there" / "deeper" / f"{i:02}.txt", f"text {i}")
    held = [
        {d.text for d in local_files([str(tmp_path / folder)]).open(order(held_out=True)).scan()}
        for folder in ("here", "there/deeper")
    ]
    assert held[0] == held[1] and 0 < len(held[0]) < 40
    with_more = write(tmp_path / "here" / "new.txt", "new").parent
    more = {d.text for d in local_files([str(with_more)]).open(order(held_out=True)).scan()}
    assert held[0] <= more, "a new file moves no other"


def test_row_hashes_are_uniform_and_agree_with_single_rows() -> None:
    hashes = row_hashes("file", 0, 100_000)
    assert abs(float((hashes < np.uint64(2**63)).mean()) - 0.5) < 0.01
    assert np.array_equal(hashes[70_000:70_010], row_hashes("file", 70_000, 70_010))
    assert np.array_equal(
        held_out_rows([("x", 1), ("file", 1000), ("y", 1)], 0.3),
        np.flatnonzero(np.concatenate([row_hashes("x", 0, 1), hashes[:1000], row_hashes("y", 0, 1)]) < 0.3 * 2.0**64),
    )


# --- identity


def test_fingerprint_is_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a" / "x.jsonl", '{"text": "abc", "body": "d"}\n' * 50)
    plain = local_files([str(path)]).fingerprint()
    moved = write(tmp_path / "b" / "x.jsonl", path.read_bytes())
    assert local_files([str(moved)]).fingerprint() == plain
    assert local_files([str(moved)], "body").fingerprint() != plain
    content = bytearray(path.read_bytes())
    content[30 * 29 + 11] ^= 1
    write(moved, bytes(content))
    assert local_files([str(moved)]).fingerprint() != plain
    monkeypatch.setattr("pipeline.data.sources.content._HASHED_WHOLE", 10)
    monkeypatch.setattr("pipeline.data.sources.content._SAMPLE_BLOCK", 10)
    sampled = local_files([str(path)]).fingerprint()
    assert sampled == local_files([str(path)]).fingerprint() != plain
    content[-4] ^= 1
    write(moved, bytes(content))
    assert local_files([str(moved)]).fingerprint() != sampled, "the last block is one of the samples"


@pytest.mark.parametrize("form", ["file", "folder", "glob", "text", "parquet"])
def test_a_changed_byte_is_noticed_at_a_resume(
    tmp_path: Path, refusal: Callable[..., str], caplog: pytest.LogCaptureFixture, form: str
) -> None:
    """Same size, same time: in a document that no stream has reached, and in one that was read."""
    rows = [f"document {row:03}" for row in range(100)]
    folder = tmp_path / "corpus"
    target = write(folder / "below" / "rows.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    if form == "text":
        target.unlink()
        for row in rows:
            target = write(folder / f"{row}.txt", f"{row}: document 071")
    elif form == "parquet":
        target.unlink()
        table = pyarrow.table({"text": rows})
        target = folder / "rows.parquet"
        pyarrow.parquet.write_table(table, target, compression="none", use_dictionary=False, write_statistics=False)
    given = {"file": str(target), "glob": str(folder / "*" / "*.jsonl")}.get(form, str(folder))

    def loader() -> PackedLoader:
        return PackedLoader(
            local_files([given]), ByteTokenizer(), sequence_length=16, batch_size=1, vocab_size=257, holdout=0.05
        )

    running = loader()
    states = [running.state_dict()]
    for _ in range(200):
        running.next_step()
    states.append(running.state_dict())
    rewrite(target, b"document 071", b"document 07l")
    loader().load_state_dict(states[0])
    assert ") has changed, in no record that was read" in caplog.text
    message = refusal(loader().load_state_dict, states[1])
    assert "--data.path or --data.dataset does not give the data of the checkpoint" in message
    rewrite(target, b"document 07l", b"document 071")
    caplog.clear()
    loader().load_state_dict(states[1])
    assert not caplog.records


def test_describe(tmp_path: Path) -> None:
    write(tmp_path / "x.txt", "abc")
    assert local_files([str(tmp_path)]).describe() == f"{tmp_path}: 1 documents in 1 files, 0.0 MB"


# --- refusals


def test_bad_paths(tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "folder" / "x.csv", "1,2")
    write(tmp_path / "blank" / "x.txt", "")
    assert "nowhere.txt does not exist" in refusal(local_files, [str(tmp_path / "nowhere.txt")])
    assert "empty.txt is empty" in refusal(local_files, [str(tmp_path / "empty.txt")])
    assert "folder holds no .txt, .md" in refusal(local_files, [str(tmp_path / "folder")])
    assert "ends in '.csv'" in refusal(local_files, [str(tmp_path / "folder" / "x.csv")])
    assert "*.md matches no" in refusal(local_files, [str(tmp_path / "*.md")])
    assert "every file is empty" in refusal(local_files, [str(tmp_path / "blank")])


def test_bad_json(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "fine"}\n\n{"text": "broken\n{"text": "fine"}\n')
    assert str(local_files([str(path)])[1].problem).startswith(f"{path}:3 is not JSON")
    path = write(tmp_path / "field.jsonl", '{"body": "x", "id": 1}\n')
    assert f"{path}:1 has no field 'text' (it has 'body', 'id'; see --data.text-field)" in refusal(
        local_files, [str(path)]
    )
    assert texts(local_files([str(path)], "body")) == ["x"]
    assert "'id' is not text" in refusal(local_files, [str(path)], "id")
    path = write(tmp_path / "array.json", '[{"text": "x"}]')
    assert f"{path}:1 is not a JSON object (one per line is expected)" in refusal(local_files, [str(path)])
    path = write(tmp_path / "cut.jsonl", '{"text": "x"}\n{"te')
    assert f"{path}:2 is not JSON" in refusal(local_files, [str(path)]), "a file that is cut short shows at once"


def test_bad_parquet(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write(tmp_path / "x.parquet", "not parquet")
    assert f"{path} cannot be read" in refusal(local_files, [str(path)])
    path = write_parquet(tmp_path / "y.parquet", ["a"], n=[1])
    assert "has no column 'body' (it has 'text', 'n')" in refusal(local_files, [str(path)], "body")
    assert "column 'n' is int64, not text" in refusal(local_files, [str(path)], "n")


def test_a_file_that_goes_away(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write(tmp_path / "x.txt", "abc")
    source = local_files([str(path)])
    path.unlink()
    assert f"{path} cannot be read" in refusal(source.__getitem__, 0)


def test_empty_sides_name_the_flag_and_a_value_that_works(refusal: Callable[..., str]) -> None:
    source = MemorySource(["a", "b", "c", "d"])
    message = refusal(IndexedDocuments, source, order(holdout=1e-6))
    assert "--data.holdout keeps none of the 4 documents of memory: raise it to " in message
    enough = float(message.split("raise it to ")[1].split()[0])
    assert IndexedDocuments(source, order(holdout=enough, held_out=True)).count() >= 1
    message = refusal(IndexedDocuments, source, order(holdout=0.999999))
    most = float(message.split("lower it to ")[1].split()[0])
    assert IndexedDocuments(source, order(holdout=most)).count() >= 1
    assert "a single document" in refusal(IndexedDocuments, MemorySource(["a"]), order())
