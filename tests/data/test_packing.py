"""Packing against a slow construction, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.loader import PackedLoader
from pipeline.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.data.conftest import MemorySource

EOS = ByteTokenizer.eos_id
documents = st.lists(st.text("abcdefgh", max_size=9), min_size=1, max_size=12)


def loader(texts: list[str], **options: object) -> PackedLoader:
    plain = {"sequence_length": 8, "batch_size": 2, "vocab_size": 257}
    return PackedLoader(MemorySource(texts, whole=True), ByteTokenizer(), **(plain | options))  # type: ignore[arg-type]


def endless(texts: list[str], stream: int, streams: int, min_tokens: int):
    """(token, label, segment, position) of a stream, one at a time, by the words of the specification."""
    segment, epoch = 0, 0
    while True:
        for number, text in enumerate(texts):
            if (number + epoch) % streams != stream or len(text) < max(min_tokens, 1):
                continue
            tokens = [*text.encode(), EOS]
            for position, token in enumerate(tokens):
                label = IGNORED if token == EOS else tokens[position + 1]
                yield token, label, segment, position
            segment += 1
        epoch += 1


def columns(batches: list[TokenBatch], row: int) -> list[tuple[int, ...]]:
    names = ("input_ids", "labels", "segment_ids", "positions")
    return list(zip(*(torch.cat([getattr(b, name)[row] for b in batches]).tolist() for name in names), strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(documents, st.integers(1, 17), st.integers(1, 5), st.integers(0, 4))
def test_streams_are_their_documents(texts: list[str], length: int, streams: int, min_tokens: int) -> None:
    if not any(len(text) >= max(min_tokens, 1) for text in texts):
        return
    packed = loader(texts, sequence_length=length, batch_size=streams, min_tokens=min_tokens)
    batches = [packed.next_step()[0] for _ in range(6)]
    for row in range(streams):
        assert columns(batches, row) == list(islice(endless(texts, row, streams, min_tokens), 6 * length))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(documents.filter(any), st.integers(1, 9))
def test_every_token_counts_but_a_documents_first(texts: list[str], length: int) -> None:
    batches = [step[0] for step in (lambda p: [p.next_step() for _ in range(8)])(loader(texts, sequence_length=length))]
    for batch in batches:
        counted = batch.labels != IGNORED
        assert torch.equal(counted, batch.input_ids != EOS)
        assert torch.equal(batch.labels[:, :-1][counted[:, :-1]], batch.input_ids[:, 1:][counted[:, :-1]])
        assert torch.equal(batch.positions[:, 1:] == 0, ~counted[:, :-1])


def test_a_document_goes_on_in_the_next_steps() -> None:
    packed = loader(["abcdefghij", "xy"], batch_size=1, sequence_length=4)
    batches = [packed.next_step()[0] for _ in range(4)]
    rows = [b.input_ids[0].tolist() for b in batches]
    assert rows == [[97, 98, 99, 100], [101, 102, 103, 104], [105, 106, EOS, 120], [121, EOS, 97, 98]]
    assert [b.labels[0].tolist() for b in batches[:3]] == [
        [98, 99, 100, 101],
        [102, 103, 104, 105],
        [106, EOS, -100, 121],
    ]
    assert [b.segment_ids[0].tolist() for b in batches] == [[0] * 4, [0] * 4, [0, 0, 0, 1], [1, 1, 2, 2]]
    assert [b.positions[0].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0], [1, 2, 0, 1]]


def test_batches_are_whole_int64_rows_in_stream_order() -> None:
    texts = [f"document {i}" for i in range(20)]
    packed = loader(texts, batch_size=2, grad_accum=3, data_rank=1, data_degree=2, sequence_length=5)
    step = packed.next_step()
    assert [b.streams.tolist() for b in step] == [[6, 7], [8, 9], [10, 11]]
    for batch in step:
        for name in ("input_ids", "labels", "segment_ids", "positions"):
            tensor = getattr(batch, name)
            assert tensor.shape == (2, 5) and tensor.dtype == torch.int64 and tensor.is_contiguous()
        for row, stream in enumerate(batch.streams.tolist()):
            assert batch.input_ids[row].tolist() == list(texts[stream].encode()[:5])


def test_fewer_documents_than_streams() -> None:
    packed = loader(["aa", "bb"], batch_size=5, sequence_length=30)
    rows = packed.next_step()[0].input_ids
    assert all({97, 98} <= set(row.tolist()) for row in rows), "the rotation brings every document to every stream"


def test_min_tokens_spares_the_tokenizer() -> None:
    seen = []

    class Counting(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            seen.append(text)
            return super().encode(text)

    source = MemorySource(["short", "long enough"], whole=True)
    PackedLoader(source, Counting(), sequence_length=50, batch_size=1, vocab_size=257, min_tokens=8).next_step()
    assert set(seen) == {"long enough"}


def test_hugging_face_and_sentencepiece_ids_are_packed(bpe_folder, sentencepiece_model) -> None:
    for name in (bpe_folder, sentencepiece_model):
        tokenizer = load_tokenizer(str(name))
        source = MemorySource(["def f(x):\n    return x", "\n"], whole=True)
        packed = PackedLoader(source, tokenizer, sequence_length=200, batch_size=1, vocab_size=tokenizer.vocab_size)
        ids = packed.next_step()[0].input_ids[0].tolist()
        first = ids[: ids.index(tokenizer.eos_id)]
        assert tokenizer.decode(first) == "def f(x):\n    return x"


@pytest.mark.parametrize("texts", [["", ""], ["abc", "abcd"]])
def test_nothing_to_read(texts: list[str], refusal: Callable[..., str]) -> None:
    for shuffled in (True, False):
        source = MemorySource(texts * 8, whole=not shuffled)
        options = {"sequence_length": 4, "batch_size": 3, "vocab_size": 257, "holdout": 0.5}
        packed = PackedLoader(source, ByteTokenizer(), min_tokens=5 if any(texts) else 0, **options)
        message = refusal(packed.next_step)
        if any(texts):
            assert message.startswith("no training document of memory has --data.min-tokens 5 tokens: lower it")
        else:
            assert message == "every training document of memory is empty: give documents with text"


def test_one_long_document_among_many_short_ones_is_found() -> None:
    texts = ["a"] * 200 + ["b" * 10]
    for source in (MemorySource(texts, whole=True), MemorySource(texts)):
        packed = PackedLoader(
            source, ByteTokenizer(), sequence_length=4, batch_size=7, vocab_size=257, min_tokens=10, holdout=0.1
        )
        assert (packed.next_step()[0].input_ids == ord("b")).all()


def test_ids_beyond_the_model(refusal: Callable[..., str]) -> None:
    assert "ends documents with id 256, beyond the model's vocabulary of 256" in refusal(loader, ["a"], vocab_size=256)

    class Wide(ByteTokenizer):
        name = "wide"
        eos_id = 0

    packed = PackedLoader(
        MemorySource(["a\xff\xff"], whole=True), Wide(), sequence_length=4, batch_size=1, vocab_size=100
    )
    message = refusal(packed.next_step)
    assert message.startswith(
        "document 0 has token ids 191, 195 beyond the model's vocabulary of 100: choose the token"
    )
    assert "--data.tokenizer is wide" in message
