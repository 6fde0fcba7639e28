"""Records that cannot be used: what stops a run, what is passed over and counted, what is read as U+FFFD."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pipeline.data.loader import PackedLoader
from pipeline.data.records import RecordLog
from pipeline.data.sources.base import Document
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.tokenizer import ByteTokenizer, load_tokenizer
from pipeline.errors import UserError
from tests.data.conftest import local_files
from tests.data.test_loader import merged, step

BAD = {
    "not JSON": ('{"text": "bro', "is not JSON (Unterminated string"),
    "no object": ("[1]", "is not a JSON object"),
    "no text": ('{"text": 5}', "'text' is not text"),
    "no field": ('{"body": "x"}', "has no field 'text' (it has 'body'"),
    "nested too deep": ('{"text": "x", "more": ' + "[" * 50_000 + "]" * 50_000 + "}", "is nested too deep"),
}


def rows(count: int = 60) -> list[str]:
    return [json.dumps({"text": f"row {row:02} " + "x" * (row % 7)}) for row in range(count)]


def write_rows(path: Path, changed: dict[int, str]) -> Path:
    path.write_text("".join(f"{changed.get(row, line)}\n" for row, line in enumerate(rows())))
    return path


def loader(source: Any, **options: Any) -> PackedLoader:
    plain = {"sequence_length": 16, "batch_size": 2, "vocab_size": 257, "holdout": 0.1}
    return PackedLoader(source, ByteTokenizer(), **(plain | options))


def stream(path: Path, **options: Any) -> HuggingFaceStream:
    return HuggingFaceStream("json", data_files=[str(path)], shuffle_buffer=5, **options)


def local(path: Path, **options: Any) -> Any:
    return local_files([str(path)], **options)


def until_it_ends(packed: PackedLoader, steps: int = 200) -> str:
    def run() -> None:
        for _ in range(steps):
            packed.next_step()

    with pytest.raises(UserError) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize("read", [local, stream])
@pytest.mark.parametrize(("line", "problem"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_stops_the_run_and_says_what_is_possible(
    tmp_path: Path, read: Callable[..., Any], line: str, problem: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {33: line})
    message = until_it_ends(loader(read(path)))
    assert message.startswith(f"{path}:34") and problem in message and "\n" not in message
    assert "correct the record where it stands, and the same command goes on" in message
    assert "pass over such records with --data.on-bad-record skip" in message


@pytest.mark.parametrize("read", [local, stream])
def test_skipped_records_are_named_and_counted_and_a_resume_is_exact(
    tmp_path: Path, read: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    changed = {0: "{", 23: "[]", 21: '{"text": 1}', 45: "nothing"}
    path = write_rows(tmp_path / "rows.jsonl", changed)

    def build() -> PackedLoader:
        return loader(read(path, skip=True), skip_bad_records=True)

    saving = build()
    for _ in range(9):
        step([saving])
    state = merged([saving])
    following = [step([saving]) for _ in range(60)]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == len(set(named)) == len(changed), "each is named once, in whatever epoch it comes again"
    assert all(sum(f"{path}:{row + 1}" in line for line in named) == 1 for row in changed)
    assert named[-1].endswith("passed over (4 so far)")
    caplog.clear()
    resumed = build()
    resumed.load_state_dict(state)
    assert all(torch.equal(step([resumed]), expected) for expected in following)
    assert merged([resumed]) == merged([saving])
    counts = [cursor["skipped"] for cursor in merged([saving])["streams"].values()]
    assert sum(counts) >= len(changed), "an epoch has passed every one"
    before = sum(cursor["skipped"] for cursor in state["streams"].values())
    assert f"passed over ({before + 1} so far)" in caplog.records[0].getMessage()
    for stream_row in (0, 1):
        text = bytes(int(token) for found in following for token in found[0][stream_row] if token < 256)
        assert b"row 55" in text and b"row 45" not in text and b"row 23" not in text


def test_all_bad_records_are_no_corpus(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "x"}\n' * 50)
    message = refusal(loader(local(path, skip=True), skip_bad_records=True).next_step)
    assert "is empty, too short or passed over" in message and "has no field 'text' (it has 'body'" in message


def test_a_damaged_parquet_file_follows_the_policy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refusal: Callable[..., str]
) -> None:
    table = pyarrow.table({"text": [f"row {row} " + "abcdefgh" * 40 for row in range(40)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="gzip", use_dictionary=False)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    for read in (local, lambda given, **options: HuggingFaceStream("parquet", data_files=[str(given)], **options)):
        caplog.clear()
        assert f"{path} (row 2" in until_it_ends(loader(read(path), sequence_length=400))
        skipping = loader(read(path, skip=True), sequence_length=400, skip_bad_records=True)
        for _ in range(40):
            skipping.next_step()
        assert "row 2" in caplog.text and "so far)" in caplog.text
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path} cannot be read" in refusal(local, path)
    assert "restore the file, or go on with --data.on-bad-record skip" in refusal(local, path)
    source = local(path, skip=True)
    assert len(source) == 1 and str(source[0].problem).startswith(f"{path} cannot be read")


# --- what is no text


def invalid_strings(*values: bytes) -> pyarrow.Array:
    """A text column that holds these bytes, which nothing has checked."""
    return pyarrow.array(list(values), pyarrow.binary()).view(pyarrow.string())


def test_undecodable_bytes_are_read_alike_in_every_format(tmp_path: Path) -> None:
    data, expected = b"caf\xe9 \xed\xa0\x80 \0 end", "caf\ufffd \ufffd\ufffd\ufffd \0 end"
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(data)
    (folder / "b.jsonl").write_bytes(b'{"text": "' + data.replace(b"\0", rb"\u0000") + b'"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid_strings(data)}), folder / "c.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": invalid_strings(data).dictionary_encode()}), folder / "d.parquet"
    )
    (folder / "e.py").write_bytes(b"# coding: utf-8\n" + data)
    for codec, end in (("gzip", "gz"), ("zstd", "zst")):
        for name in ("a.txt", "b.jsonl"):
            with pyarrow.CompressedOutputStream(str(folder / f"{name}.{end}"), codec) as file:
                file.write((folder / name).read_bytes())
    source = local(folder)
    documents = [source[i] for i in range(len(source))]
    assert len(documents) == 9
    assert {document.text.removeprefix("# coding: utf-8\n") for document in documents} == {expected}
    assert all(document.undecodable and document.problem is None for document in documents)
    for kind, name in (("json", "b.jsonl"), ("json", "b.jsonl.zst"), ("parquet", "c.parquet"), ("text", "a.txt")):
        streamed = HuggingFaceStream(kind, data_files=[str(folder / name)])
        row = streamed.document(next(iter(streamed.data)), 1)
        assert (row.text, row.undecodable) == (expected, True), name


DECLARED = {
    "no such": b"# coding: no-such\n",
    "not ASCII": b"# coding: utf-16\n",
    "an escape": b"# coding: unicode_escape\n'\\ud800'\n",
    "no text encoding": b"# coding: rot13\n",
    "cannot decode": b"# coding: idna\na.xn--999999999.b\n",
    "always fails": b"# coding: undefined\n",
    "against its mark": b"\xef\xbb\xbf# coding: latin-1\n",
    "wrong for its bytes": b"# coding: ascii\n# caf\xc3\xa9\n",
}


@pytest.mark.parametrize("content", DECLARED.values(), ids=DECLARED.keys())
def test_a_declared_coding_that_cannot_be_trusted_is_not_followed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.py").write_bytes(content)
    document = local(tmp_path)[0]
    assert document.text == content.decode("utf-8-sig") and document.undecodable


def test_a_declared_coding_that_fits_is_followed(tmp_path: Path) -> None:
    for coding in ("latin-1", "shift_jis", "cp1252", "utf-8"):
        text = f"# coding: {coding}\nname = 'e'\n" + ("# ソ\n" if coding == "shift_jis" else "")
        (tmp_path / "a.py").write_bytes(text.encode(coding))
        document = local(tmp_path)[0]
        assert (document.text, document.undecodable) == (text, False)


def test_a_byte_order_mark_is_followed(tmp_path: Path) -> None:
    for coding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("né\n日本".encode(coding))
        assert (local(tmp_path)[0].text, local(tmp_path)[0].undecodable) == ("né\n日本", False)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\0\0\xd8b\0\n")
    assert (local(tmp_path)[0].text, local(tmp_path)[0].undecodable) == ("a\ufffdb\ufffd", True)


def test_a_first_line_of_a_byte_order_mark_alone_is_blank(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'\n{"text": "x"}\n')
    assert [local(path)[row].text for row in range(2)] == ["", "x"]


def test_lines_of_two_byte_characters_are_refused_by_name(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16"))
    assert "a.jsonl is UTF-16 or UTF-32 text" in refusal(local, tmp_path)


MISNAMED = {
    "gzip data": b"\x1f\x8b\x08\0",
    "zstd data": b"\x28\xb5\x2f\xfd",
    "a parquet file": b"PAR1....PAR1",
    "a zip archive": b"PK\x03\x04",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize(("what", "content"), MISNAMED.items(), ids=MISNAMED.keys())
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_what_its_name_says_is_named(
    tmp_path: Path, refusal: Callable[..., str], name: str, what: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} is {what}" in refusal(local, tmp_path)
    if name == "a.txt":  # a larger one is not opened before it is read
        (tmp_path / name).write_bytes(content + bytes(1000))
    assert str(local(tmp_path, skip=True)[0].problem).startswith(f"{tmp_path / name} is {what}")


def test_integers_of_any_length_and_names_of_any_kind_are_read(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "id": ' + "9" * 10_000 + "}\n")
    assert local(path)[0].text == "x"
    path.write_text(json.dumps({f"{number}\ud800\n" + "k" * 100: 1 for number in range(20)}))
    message = refusal(local, path)
    message.encode()
    assert len(message) < 1000 and message.count("kkk") and ", ...; see --data.text-field)" in message


def test_a_name_that_is_no_text_can_be_read_and_told(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jsonl").write_text('{"text": "x"}\n[]\n')
    source = local(tmp_path, skip=True)
    assert source[0].text == "x"
    assert json.loads(json.dumps(source.fingerprint())) == source.fingerprint()
    assert source.same_numbering(source.fingerprint())


def test_no_tokenizer_is_given_half_a_pair_or_chokes_on_nul(
    tmp_path: Path, bpe_folder: Path, sentencepiece_model: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "nul \\u0000 x"}\n' * 20)
    for name in ("bytes", str(bpe_folder), str(sentencepiece_model)):
        tokenizer = load_tokenizer(name)
        packed = PackedLoader(
            local(path), tokenizer, sequence_length=64, batch_size=1, vocab_size=tokenizer.vocab_size, holdout=0.2
        )
        text = tokenizer.decode(packed.next_step()[0].input_ids[0].tolist())
        assert "a\ufffdb" in text and "nul \0 x" in text


def test_undecodable_documents_are_told_at_the_1st_10th_and_100th(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"text": "%d \xff"}\n' % row for row in range(250)))
    packed = loader(local(path), sequence_length=40)
    for _ in range(80):
        packed.next_step()
    said = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("(")[2] for line in said] == [f"{n} documents so far)" for n in (1, 10, 100)]
    counts = [cursor["undecodable"] for cursor in packed.state_dict()["streams"].values()]
    assert sum(counts) > 220


def test_a_rank_that_reads_the_same_as_another_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = RecordLog(skip=True, remedy="", should_report=False)
    log.refuse_or_skip(Document("a", "", "a is broken"))
    log.note(Document("b", "\ufffd", undecodable=True))
    assert (log.skipped, log.undecodable) == (1, 1) and not caplog.records


def test_many_bad_records_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    log = RecordLog(skip=True, remedy="")
    for number in range(20_000):
        log.refuse_or_skip(Document(str(number), "", "broken"))
    assert log.skipped == 20_000 and 900 < len(caplog.records) < 1100


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {})
    for skip in (False, True):
        source = local(path, skip=skip)
        path.write_text("x" + path.read_text())
        assert f"{path} has changed while it was being read" in refusal(source.__getitem__, 3)
        path.write_text("\n")
        assert f"{path} has changed while it was being read" in refusal(source.__getitem__, 3)
        write_rows(path, {})
