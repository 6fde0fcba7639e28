"""Streamed data sets, through the library's own local streaming."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PackedLoader
from pipeline.data.resume import check_fingerprint
from pipeline.data.sources.base import Document, Order
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.sources.streamed import StreamedDocuments, _Rows
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from tests.data.conftest import rewrite
from tests.data.test_compressed import CODECS
from tests.data.test_loader import SPLITS, merged, step


def source(files: list[str], **options: Any) -> HuggingFaceStream:
    return HuggingFaceStream("json", data_files=files, **({"shuffle_buffer": 7} | options))


def order(**changes: Any) -> Order:
    plain = {"streams": 3, "local_streams": range(3), "held_out": False, "holdout": 0.2, "shuffle": True, "seed": 1}
    return Order(**(plain | changes))


def texts(files: list[str]) -> list[str]:
    return [json.loads(line)["text"] for file in files for line in Path(file).read_text().splitlines()]


def read_epoch(documents: Any, number: int) -> list[str]:
    found = []
    while (document := documents.read(number, len(found))) is not None:
        found.append(document.text)
    return found


def ranks(split: tuple[int, int, int], files: list[str] | HuggingFaceStream, **options: Any) -> list[PackedLoader]:
    degree, accum, size = split
    plain = {"sequence_length": 16, "vocab_size": 257, "holdout": 0.2, "seed": 3}
    shape = {"data_degree": degree, "grad_accum": accum, "batch_size": size}
    data = source(files) if isinstance(files, list) else files
    return [PackedLoader(data, ByteTokenizer(), data_rank=rank, **shape, **(plain | options)) for rank in range(degree)]


def test_epochs_are_complete_disjoint_and_shuffled(json_shards: list[str]) -> None:
    data = source(json_shards)
    plain = StreamedDocuments(data, order(shuffle=False))
    natural = read_epoch(plain, 0)
    held = read_epoch(StreamedDocuments(data, order(shuffle=False, held_out=True)), 0)
    assert sorted(natural + held) == sorted(texts(json_shards)) and held and natural
    assert natural == [text for text in texts(json_shards) if text not in held], "natural order is that of the files"
    shuffled = StreamedDocuments(data, order())
    epochs = [read_epoch(shuffled, number) for number in range(3)]
    assert all(sorted(epoch) == sorted(natural) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [natural, *epochs]}) == 4
    assert len({text[1] for text in epochs[0][:7]}) > 1, "a block mixes shards"
    assert shuffled.count() == len(natural)
    assert sorted(document.text for document in shuffled.scan()) == sorted(natural)


def test_what_is_held_out_depends_on_the_content_alone(json_shards: list[str], tmp_path: Path) -> None:
    held = [
        set(read_epoch(StreamedDocuments(source(files), order(held_out=True, seed=seed, streams=streams)), 0))
        for files, seed, streams in ((json_shards, 1, 3), (json_shards[::-1], 2, 5))
    ]
    assert held[0] == held[1]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
def test_streams_of_any_speed_read_their_documents(json_shards: list[str], shuffle: bool, limit: int) -> None:
    """Whatever is buffered or read again, a stream sees what reading everything in order shows."""
    data = source(json_shards)
    expected = [read_epoch(StreamedDocuments(data, order(shuffle=shuffle)), number) for number in range(4)]
    documents = StreamedDocuments(data, order(shuffle=shuffle), buffer_bytes=limit)
    places = {stream: (0, documents._order.first(stream, 0)) for stream in range(3)}
    for turn in range(150):
        stream = 2 if turn % 50 == 49 else turn % 2 if turn < 100 else 2
        number, position = places[stream]
        if number == 4:
            continue
        document = documents.read(number, position)
        if document is None:
            assert position >= len(expected[number])
            places[stream] = (number + 1, documents._order.first(stream, number + 1))
        else:
            assert document.text == expected[number][position]
            places[stream] = (number, position + 3)
        assert documents._buffered == sum(len(document.text) for document in documents._buffer.values())
        assert documents._buffered <= limit + 3 * 40, "one document per stream may exceed the limit"


def test_a_rank_keeps_its_own_documents_only(json_shards: list[str]) -> None:
    documents = StreamedDocuments(source(json_shards), order(streams=6, local_streams=range(2, 4), shuffle=False))
    documents.read(0, 32)
    assert {position for _, position in documents._buffer} == {3, 9, 15, 21, 27}


@lru_cache
def shared_source(files: tuple[str, ...]) -> HuggingFaceStream:
    return source(list(files))


@pytest.fixture
def _many_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.streamed._SNAPSHOT_EVERY", 5)


@pytest.mark.usefixtures("_many_snapshots")
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 30),
    st.sampled_from(SPLITS),
    st.sampled_from(SPLITS),
    st.booleans(),
    st.integers(0, 14),
    st.booleans(),
)
def test_resume_is_exact(json_shards, before, first, second, shuffle, min_tokens, prefetch) -> None:
    options = {"shuffle": shuffle, "min_tokens": min_tokens, "prefetch": prefetch}
    data = shared_source(tuple(json_shards))
    saving = ranks(first, data, **options)
    for _ in range(before):
        step(saving)
    loading = ranks(second, data, **options)
    state = merged(saving)
    for rank in loading:
        rank.load_state_dict(state)
    for _ in range(4):
        assert torch.equal(step(saving), step(loading))
    assert merged(saving)["streams"].keys() == merged(loading)["streams"].keys()


@pytest.mark.usefixtures("_many_snapshots")
def test_resume_does_not_read_from_the_start(json_shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ranks((1, 1, 2), json_shards, sequence_length=64)
    for _ in range(6):
        step(saving)
    state = merged(saving)
    cursors = state["streams"].values()
    assert all(0 < c["reader"]["position"] <= c["position"] and c["reader"]["epoch"] == c["epoch"] for c in cursors)
    read = []
    plain = HuggingFaceStream.document
    monkeypatch.setattr(HuggingFaceStream, "document", lambda *given: read.append(given) or plain(*given))
    loading = ranks((1, 1, 2), json_shards, sequence_length=64)
    loading[0].load_state_dict(state)
    loaded = step(loading)
    assert len(read) < 30
    assert torch.equal(step(saving), loaded)


@pytest.mark.usefixtures("_many_snapshots")
def test_parquet_streams_and_resumes(tmp_path: Path) -> None:
    files = []
    for shard in range(3):
        rows = [f"{shard}-{row} " + "y" * (row % 11) for row in range(30)]
        files.append(str(tmp_path / f"{shard}.parquet"))
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": range(30)}), files[-1], row_group_size=8)

    stream = HuggingFaceStream("parquet", data_files=files, shuffle_buffer=5)

    def build() -> PackedLoader:
        return PackedLoader(stream, ByteTokenizer(), sequence_length=20, batch_size=3, vocab_size=257, holdout=0.2)

    packed = build()
    for _ in range(8):
        resumed = build()
        resumed.load_state_dict(json.loads(json.dumps(packed.state_dict())))
        assert torch.equal(step([packed]), step([resumed]))


def test_a_local_folder_is_a_data_set(json_shards: list[str]) -> None:
    folder = Path(json_shards[0]).parent
    documents = StreamedDocuments(HuggingFaceStream(str(folder)), order(shuffle=False))
    assert len(read_epoch(documents, 0)) > 30


def test_held_out_documents_are_read_once(json_shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = ranks((1, 1, 2), json_shards, held_out=True)[0]
    first = [step([packed]) for _ in range(4)]
    read = []
    plain = HuggingFaceStream.document
    monkeypatch.setattr(HuggingFaceStream, "document", lambda *given: read.append(given) or plain(*given))
    packed.reset()
    assert all(torch.equal(step([packed]), expected) for expected in first)
    assert not read


def test_fingerprint(json_shards: list[str]) -> None:
    data = source(json_shards)
    assert data.fingerprint() == source(json_shards).fingerprint()
    for other in (source(json_shards[:-1]), source(json_shards, shuffle_buffer=8)):
        assert other.fingerprint() != data.fingerprint()
    first = Path(json_shards[0])
    first.write_text(first.read_text().replace("<0.0>", "<0.1>"))
    assert source(json_shards).fingerprint() != data.fingerprint()
    assert "json, split 'train', streamed: 5 shards" in data.describe()


def test_refusals(
    json_shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    import huggingface_hub.constants

    assert "shard0.jsonl:1 has no field 'body' (it has 'text'; see --data.text-field)" in refusal(
        source, json_shards, text_field="body"
    )
    assert "(split 'nothing') cannot be read" in refusal(source, json_shards, split="nothing")
    assert "cannot be read: Unable to find" in refusal(source, [str(tmp_path / "absent.jsonl")])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(HuggingFaceStream, "nobody/nothing")
    assert "--data.dataset nobody/nothing" in message and "give local documents with --data.path" in message
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n' * 3 + '{"text": "bro\n')
    packed = ranks((1, 1, 2), [str(broken)])[0]
    assert f"{broken}:4 is not JSON" in refusal(packed.next_step)
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 1}\n')
    assert f"{numbers}:1: 'text' is not text" in refusal(source, [str(numbers)])
    table = tmp_path / "table.csv"
    table.write_text("text,other\n1,2\n")
    csv = HuggingFaceStream("csv", data_files=[str(table)])
    assert "holds int values in 'text', not text" in refusal(ranks((1, 1, 2), csv)[0].next_step)
    parquet = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), parquet)
    message = refusal(HuggingFaceStream, "parquet", data_files=[str(parquet)])
    assert "--data.dataset parquet holds int64 values in 'text', not text: name the text with" in message
    message = refusal(HuggingFaceStream, "parquet", data_files=[str(parquet)], text_field="body")
    assert "has no column 'body' (it has 'text')" in message


def test_an_empty_side_is_named(json_shards: list[str], refusal: Callable[..., str]) -> None:
    for held_out, holdout, change in ((True, 1e-9, "raise"), (False, 1 - 1e-9, "lower")):
        packed = ranks((1, 1, 2), json_shards, held_out=held_out, holdout=holdout)[0]
        assert f"document: {change} --data.holdout" in refusal(packed.next_step)


def test_no_document_is_long_enough(json_shards: list[str], refusal: Callable[..., str]) -> None:
    packed = ranks((1, 1, 3), json_shards, min_tokens=1000)[0]
    assert "no training document of json has --data.min-tokens 1000 tokens" in refusal(packed.next_step)


def test_a_data_set_of_the_hub_counts_with_its_commit(
    json_shards: list[str], monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    data, prints = source(json_shards), []
    for commit in ("a" * 40, "b" * 40):
        group = type("Group", (list,), {"origin_metadata": [commit]})([f"hf://datasets/some/body@{commit}/x.jsonl"])
        monkeypatch.setattr(data._builder.config, "data_files", {"train": group})
        for name in ("_files", "_commit"):
            data.__dict__.pop(name, None)
        prints.append(data.fingerprint())
    assert [found["revision"] for found in prints] == ["a" * 40, "b" * 40]
    assert prints[0]["files"] != prints[1]["files"]
    message = refusal(check_fingerprint, {"streams": 1, "source": prints[0]}, {"streams": 1, "source": prints[1]})
    assert f"revision {'a' * 40}, now {'b' * 40}" in message


def test_a_script_in_a_folder_of_data_is_not_run(tmp_path: Path) -> None:
    folder, marker = tmp_path / "corpus", tmp_path / "marker"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n' * 20)
    # Whether the library reads the rows or refuses the folder, the script stays text.
    with contextlib.suppress(UserError):
        HuggingFaceStream(str(folder)).fingerprint()
    assert not marker.exists()


def test_a_changed_byte_is_noticed_at_a_resume(
    tmp_path: Path, refusal: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of a folder that the library streams: same size, same time; in a row that was read, and in one that was not."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text("".join(json.dumps({"text": f"row {row:02}"}) + "\n" for row in range(60)))
    (loader,) = ranks((1, 1, 2), HuggingFaceStream(str(folder)), shuffle=False)
    for _ in range(8):
        step([loader])
    state = json.loads(json.dumps(loader.state_dict()))
    following = [step([loader]) for _ in range(4)]
    read, unread = sorted(texts([str(folder / "train-0.jsonl")]))[3].encode(), b"row 55"
    rewrite(folder / "train-0.jsonl", read, b"x" + read[1:])
    (resumed,) = ranks((1, 1, 2), HuggingFaceStream(str(folder)), shuffle=False)
    assert "--data.path or --data.dataset does not give the data" in refusal(resumed.load_state_dict, state)
    rewrite(folder / "train-0.jsonl", b"x" + read[1:], read)
    rewrite(folder / "train-0.jsonl", unread, b"raw 55")
    (resumed,) = ranks((1, 1, 2), HuggingFaceStream(str(folder)), shuffle=False)
    resumed.load_state_dict(state)
    assert "has changed, in no record that was read" in caplog.text
    assert all(torch.equal(step([resumed]), expected) for expected in following)


# --- rows as they are


def rows_of(kind: str, *files: Path, **options: Any) -> list[Document]:
    data = HuggingFaceStream(kind, data_files=[str(file) for file in files], **options)
    return list(_Rows(data, order(shuffle=False), 0, None))


OTHER_COLUMNS = {
    "number then text": ([1, 2], ["a", "b"]),
    "number then object": ([1, 2], [{"x": 1}, {"x": 2}]),
    "number then list": ([1, 2], [[1], [2]]),
    "object of other fields": ([{"x": 1}], [{"y": [2]}]),
    "absent": ([1, 2], None),
}


@pytest.mark.parametrize(("before", "after"), OTHER_COLUMNS.values(), ids=OTHER_COLUMNS.keys())
def test_a_column_that_is_not_used_may_change_its_type(tmp_path: Path, before: list[Any], after: Any) -> None:
    """Between files, and between the rows of one."""
    tables = [{"text": [f"<{n}>"] * len(before), **({} if column is None else {"meta": column})}
              for n, column in enumerate((before, after))]  # fmt: skip
    lines = []
    for number, table in enumerate(tables):
        rows = [dict(zip(table, values, strict=False)) for values in zip(*table.values(), strict=True)]
        lines.append("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{number}.jsonl").write_text(lines[-1])
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{number}.parquet")
    (tmp_path / "both.jsonl").write_text("".join(lines) * 100)
    expected = ["<0>"] * len(before) + ["<1>"] * len(before)
    for kind, end in (("json", "jsonl"), ("parquet", "parquet")):
        found = rows_of(kind, tmp_path / f"0.{end}", tmp_path / f"1.{end}")
        assert [document.text for document in found] == expected
    assert [document.text for document in rows_of("json", tmp_path / "both.jsonl")] == expected * 100


def test_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": null}')
    assert [(d.name, d.text) for d in rows_of("json", tmp_path / "a.jsonl")] == [
        (f"{tmp_path / 'a.jsonl'}:{line}", text) for line, text in ((1, "one"), (3, "two"), (4, ""))
    ]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
    assert [(d.name, d.text) for d in rows_of("parquet", tmp_path / "a.parquet")] == [
        (f"{tmp_path / 'a.parquet'} (row {row})", text) for row, text in ((0, "one"), (1, ""))
    ]


def test_arrays_and_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    (tmp_path / "b.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "c.json").write_text("[]")
    for end, codec in CODECS.items():
        with pyarrow.CompressedOutputStream(str(tmp_path / f"d.jsonl.{end}"), codec) as file:
            file.write(b'{"text": "one"}\n{"text": "two"}\n')
    for name in ("a.json", "b.json", "d.jsonl.gz", "d.jsonl.zst"):
        assert [document.text for document in rows_of("json", tmp_path / name)] == ["one", "two"], name
    assert rows_of("json", tmp_path / "c.json") == []


def test_what_cannot_be_read_of_a_file_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.hub_rows._READ_AHEAD", 1000)
    good = b"".join(b'{"text": "row %06d"}\n' % row for row in range(20_000))
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    for end, codec in CODECS.items():
        path = tmp_path / f"d.jsonl.{end}"
        with pyarrow.CompressedOutputStream(str(path), codec) as file:
            file.write(good)
        path.write_bytes(path.read_bytes()[:-10])
        found = rows_of("json", path, tmp_path / "deep.json", skip=True)
        *whole, broken, deep = found
        assert broken.name.startswith(f"{path}:") and "cannot be read, nor what follows it" in str(broken.problem)
        assert "maximum recursion" in str(deep.problem)
        assert len(whole) > 4000 and not any(document.problem for document in whole)
        assert rows_of("json", path, tmp_path / "deep.json", skip=True) == found


def test_a_network_that_fails_is_no_bad_record(
    json_shards: list[str], monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    packed = ranks((1, 1, 2), source(json_shards, skip=True), skip_bad_records=True)[0]
    monkeypatch.setattr("pipeline.data.sources.hub_rows.xopen", fails)
    assert "--data.dataset json broke off (" in refusal(packed.next_step)
