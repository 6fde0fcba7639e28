"""Mixtures: each stream reads one source as if that were all there is, and the position is exact as for one source."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ModelConfig, RunConfig
from pipeline.config_file import to_plain
from pipeline.data.build import build_loader, build_source, list_data
from pipeline.data.loader import PackedLoader
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.sources.mixed import MixedSource, apportion, spread
from pipeline.data_config import DataConfig
from pipeline.parallel.topology import Topology
from tests.data.conftest import MemorySource, local_files
from tests.data.test_loader import SPLITS, loader, merged, ranks, step

BOOKS = [f"b{i:02}" + "abcdefgh"[: i % 7] * (1 + i % 3) for i in range(30)]
CODE = [f"c{i:02}" + "xyz" * (i % 4) for i in range(11)]
CHAT = [f"t{i:02}" for i in range(50)]


def mixture(weights: tuple[float, ...] = (0.5, 0.3, 0.2), texts: tuple[list[str], ...] = (BOOKS, CODE, CHAT)) -> Any:
    names = ("books", "code", "chat")
    return MixedSource({name: MemorySource(part) for name, part in zip(names, texts, strict=False)}, weights)


weights_of_sources = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(weights_of_sources, st.integers(1, 200))
def test_every_source_gets_its_share_of_the_streams_rounded_up_or_down(weights, streams) -> None:
    counts = apportion(weights, streams)
    assert sum(counts) == streams
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight * streams / sum(weights)) < 1 + 1e-9


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_streams_of_all_sources_are_spread_over_the_batch(counts) -> None:
    sources = spread(counts)
    assert [sources.count(source) for source in range(len(counts))] == counts
    if len(counts) == 2:
        for rows in range(len(sources)):
            assert abs(sources[:rows].count(0) - rows * counts[0] / sum(counts)) < 1


def test_shares_are_those_of_the_largest_remainders() -> None:
    assert apportion([0.5, 0.3, 0.2], 12) == [6, 4, 2]  # 6, 3.6, 2.4
    assert apportion([6, 4], 10) == apportion([0.6, 0.4], 10) == [6, 4]
    # As binary fractions, three tenths are less than half of six.
    for streams in (16, 24, 64):
        assert apportion([6, 3, 1], streams) == apportion([0.6, 0.3, 0.1], streams)
    assert apportion([7, 1, 2], 32) == apportion([0.7, 0.1, 0.2], 32)
    assert apportion([1, 1, 1], 4) == [2, 1, 1], "of equal remainders, that of the first source"
    assert spread([3, 1]) == [0, 0, 1, 0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from(SPLITS), st.integers(1, 30), st.integers(0, 3))
def test_a_stream_reads_its_source_as_if_that_were_all_there_is(weights, split, length, seed) -> None:
    counts = apportion(weights, 12)
    if 0 in counts:
        return
    options = {"sequence_length": length, "seed": seed}
    mixed = ranks(split, mixture(weights), **options)
    alone = [
        ranks((1, 1, count), MemorySource(part), **options)
        for count, part in zip(counts, (BOOKS, CODE, CHAT), strict=True)
    ]
    for _ in range(8):
        expected = [iter(step(one).unbind(1)) for one in alone]
        for stream, (row, source) in enumerate(zip(step(mixed).unbind(1), spread(counts), strict=True)):
            assert torch.equal(row[:-1], next(expected[source])[:-1]), stream


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 25), st.sampled_from(SPLITS), st.sampled_from(SPLITS), st.integers(1, 40), st.booleans(),
    st.integers(0, 4), st.booleans(),
)  # fmt: skip
def test_resume_is_exact(before, first, second, length, shuffle, min_tokens, prefetch) -> None:
    """At any step, epochs apart in each source; saved by one split and loaded by another."""
    options = {"sequence_length": length, "shuffle": shuffle, "min_tokens": min_tokens, "seed": 3}
    texts = (BOOKS, [text + "more" for text in CODE], [text + "more" for text in CHAT])
    saving = ranks(first, mixture(texts=texts), prefetch=prefetch, **options)
    for _ in range(before):
        step(saving)
    loading = ranks(second, mixture(texts=texts), prefetch=prefetch, **options)
    if before % 2:
        step(loading)
    state = merged(saving)
    for rank in loading:
        rank.load_state_dict(state)
    assert merged(loading) == state
    for _ in range(4):
        assert torch.equal(step(saving), step(loading))


def test_each_source_has_epochs_of_its_own_and_gives_every_document_once_in_each() -> None:
    texts = ([f"b{i:02}" for i in range(12)], [f"c{i:02}" for i in range(4)])
    sources = {name: MemorySource(part, whole=True) for name, part in zip(("b", "c"), texts, strict=True)}
    packed = PackedLoader(
        MixedSource(sources, [2, 2]), loader().tokenizer, sequence_length=4, batch_size=4, vocab_size=257
    )
    seen: dict[int, list[str]] = {row: [] for row in range(4)}
    for _ in range(12):
        batch = packed.next_step()[0]
        for row in range(4):
            seen[row].append(bytes(batch.input_ids[row, :3].tolist()).decode())
    books, code = seen[0] + seen[2], seen[1] + seen[3]
    assert Counter(books) == Counter(texts[0] * 2)
    assert Counter(code) == Counter(texts[1] * 6)
    cursors = packed.state_dict()["streams"]
    assert [cursor["epoch"] for cursor in cursors.values()] != [cursors["0"]["epoch"]] * 4


def write_rows(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_files_and_a_streamed_data_set_are_mixed_and_resumed(tmp_path: Path) -> None:
    """Ten streams read files and two a data set, which some data ranks then do not read at all."""
    books = write_rows(tmp_path / "books" / "rows.jsonl", BOOKS)
    for shard in range(3):
        write_rows(tmp_path / "chat" / f"{shard}.jsonl", [f"{shard}{text}" for text in CHAT])

    def source() -> MixedSource:
        streamed = HuggingFaceStream(str(tmp_path / "chat"), shuffle_buffer=5)
        return MixedSource({"books": local_files([books]), "chat": streamed}, [5, 1])

    whole = ranks((1, 1, 12), source())
    saving = ranks((6, 1, 2), source())
    for _ in range(20):
        assert torch.equal(step(saving), step(whole))
    state = merged(saving)
    for split in ((3, 4, 1), (12, 1, 1)):
        loading = ranks(split, source())
        for rank in loading:
            rank.load_state_dict(state)
        again = ranks((1, 1, 12), source())
        again[0].load_state_dict(state)
        for _ in range(5):
            assert torch.equal(step(again), step(loading))


def test_the_log_says_how_many_streams_read_each_source() -> None:
    packed = loader(mixture(), batch_size=12)
    assert packed.describe() == (
        "0.5 of memory; 0.3 of memory; 0.2 of memory; "
        f"{packed._documents.count()} training documents; streams: 6 of books, 4 of code, 2 of chat;"
        " tokenizer bytes (260 ids)"
    )
    assert loader(mixture(), batch_size=12, held_out=True).describe().count("held-out documents") == 1


# --- refusals


def test_a_source_without_a_stream_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal(loader, mixture((0.5, 0.3, 0.2)), batch_size=2) == (
        "--data.mix: no stream is left for chat, of 2 training streams: give it a larger weight, or take 5 streams or"
        " more (--batch-size x data degree x --grad-accum)"
    )
    loader(mixture((0.5, 0.3, 0.2)), batch_size=5)
    held_out = refusal(loader, mixture((1, 1, 1)), batch_size=2, held_out=True)
    assert "of 2 held-out streams" in held_out and held_out.endswith("(--evaluation.batch-size x data degree)")


def test_a_source_without_a_document_is_named_though_others_have_some(refusal: Callable[..., str]) -> None:
    texts = (BOOKS, ["" for _ in range(20)], CHAT)
    packed = loader(mixture(texts=texts), batch_size=12)
    assert refusal(packed.next_step) == "every training document of memory is empty: give documents with text"


@pytest.mark.parametrize("accept", [False, True])
def test_another_mixture_is_refused_at_a_resume(refusal: Callable[..., str], accept: bool) -> None:
    state = json.loads(json.dumps(loader(mixture(), batch_size=12).state_dict()))
    loader(mixture((5, 3, 2)), batch_size=12).load_state_dict(state)
    for other, shown in (
        (mixture((0.3, 0.5, 0.2)), "[0.5, 0.3, 0.2], now [0.3, 0.5, 0.2]"),
        (mixture((0.5, 0.5)), "[0.5, 0.3, 0.2], now [0.5, 0.5]"),
        (MemorySource(BOOKS), "[0.5, 0.3, 0.2], now None"),
    ):
        message = refusal(loader(other, batch_size=12, accept_change=accept).load_state_dict, state)
        assert message.startswith(f"--data.mix does not give the data of the checkpoint ({shown}): restore it"), message
    single = loader(MemorySource(BOOKS), batch_size=12).state_dict()
    message = refusal(loader(mixture(), batch_size=12, accept_change=accept).load_state_dict, single)
    assert "(None, now [0.5, 0.3, 0.2])" in message


def test_a_change_in_one_source_counts_as_in_a_single_one(
    tmp_path: Path, refusal: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_rows(tmp_path / name / "rows.jsonl", texts) for name, texts in (("b", BOOKS), ("c", CHAT))]

    def opened(**options: Any) -> PackedLoader:
        sources = {path: local_files([path]) for path in paths}
        return loader(MixedSource(sources, [1, 1]), shuffle=False, **options)

    saving = opened()
    for _ in range(2):
        saving.next_step()
    state = json.loads(json.dumps(saving.state_dict()))
    write_rows(Path(paths[1]), [*CHAT[:-1], "another"])
    resumed = opened()
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state)
    assert "has changed, in no record that was read: the run goes on" in caplog.text
    assert torch.equal(step([saving]), step([resumed]))
    write_rows(Path(paths[1]), [f"other {text}" for text in CHAT])
    message = refusal(opened().load_state_dict, state)
    assert message.startswith("--data.mix does not give the data of the checkpoint (source 2 bytes ")
    opened(accept_change=True).load_state_dict(state)


# --- configuration


def config(*mix: str, **changes: Any) -> RunConfig:
    plain = {"steps": 1, "batch_size": 4, "sequence_length": 16, "lr": 1e-3}
    return RunConfig("test", ModelConfig(), data=DataConfig(mix=mix, holdout=0.2), **(plain | changes))


def test_a_name_is_a_path_where_there_is_one_and_else_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "books" / "rows.jsonl", BOOKS)
    mixed = config("books=3", "stdlib=1")
    files, no_files = list_data(mixed)
    assert files is not None and [file.identity for file in files.files] == ["rows.jsonl"] and no_files is None
    packed = build_loader(mixed, Topology(), vocab_size=260)
    assert "streams: 3 of books, 1 of stdlib" in packed.describe()
    texts = [bytes(row[:1].tolist()) for row in packed.next_step()[0].input_ids]
    assert [texts.count(b"b"), len(texts)] == [3, 4]
    # What rank 0 has listed decides, though another rank sees nothing of that name.
    elsewhere = build_source(config("elsewhere=3", "stdlib=1"), (files, None))
    assert elsewhere.fingerprint() == packed.source.fingerprint()
    for name in ("./absent", "/absent", "*.absent", "absent.jsonl"):
        message = refusal(build_source, config(f"{name}=1"))
        assert message.startswith(f"--data.mix {name}: --data.path {name} "), message


def test_a_config_with_a_mixture_is_plain_yaml() -> None:
    assert to_plain(config("books=3", "stdlib=1"))["data"]["mix"] == ["books=3", "stdlib=1"]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (("books",), "--data.mix books: give NAME=WEIGHT, such as books=0.5"),
        (("=0.5",), "--data.mix =0.5: give NAME=WEIGHT, such as books=0.5"),
        (("books=",), "--data.mix books=: '' is no weight: give a number above 0"),
        *(
            ((f"books={weight}",), f"--data.mix books={weight}: {weight!r} is no weight: give a number above 0")
            for weight in ("half", "0", "-1", "nan", "inf")
        ),
        (("a=1", "b=2", "a=1"), "--data.mix names a twice: give it once, with the sum of its weights"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(
    mix: tuple[str, ...], message: str, refusal: Callable[..., str]
) -> None:
    assert refusal(DataConfig, mix=mix) == message


def test_a_mixture_beside_a_single_source_is_refused(refusal: Callable[..., str]) -> None:
    for flag, other in {"--data.path": {"path": ("a",)}, "--data.dataset": {"dataset": "a"}}.items():
        message = refusal(DataConfig, mix=("a=1",), **other)
        assert message == f"{flag} and --data.mix are both given: name all sources in --data.mix"
