"""The loader's position: exact at every step, under every split of the streams, and refused where data differs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PackedLoader
from pipeline.data.sources.local import standard_library
from pipeline.data.tokenizer import ByteTokenizer, load_tokenizer
from pipeline.errors import UserError
from tests.data.conftest import MemorySource, local_files

TEXTS = [f"{i:02}" + "abcdefgh"[: i % 7] * (1 + i % 3) for i in range(30)]
NAMES = ("input_ids", "labels", "segment_ids", "positions", "streams")


def loader(source: Any = None, **options: Any) -> PackedLoader:
    plain = {"sequence_length": 8, "batch_size": 2, "vocab_size": 257, "holdout": 0.2}
    return PackedLoader(source or MemorySource(TEXTS), ByteTokenizer(), **(plain | options))


def step(ranks: list[PackedLoader]) -> torch.Tensor:
    """[5, streams, T] of one step of all ranks, rows in stream order; a row of streams is spread over T."""
    batches = [batch for rank in ranks for batch in rank.next_step()]
    length = batches[0].input_ids.shape[1]
    rows = [torch.cat([getattr(b, name) for b in batches]) for name in NAMES]
    rows[-1] = rows[-1][:, None].expand(-1, length)
    assert rows[-1][:, 0].tolist() == list(range(len(rows[-1])))
    return torch.stack(rows)


def merged(ranks: list[PackedLoader]) -> dict[str, Any]:
    """What a checkpoint keeps: the cursors of all ranks, as JSON."""
    states = [rank.state_dict() for rank in ranks]
    assert all(state["fingerprint"] == states[0]["fingerprint"] for state in states)
    streams = {key: value for state in states for key, value in state["streams"].items()}
    return json.loads(json.dumps({"streams": streams, "fingerprint": states[0]["fingerprint"]}))


SPLITS = [(1, 1, 12), (1, 6, 2), (2, 3, 2), (3, 2, 2), (3, 4, 1), (12, 1, 1), (2, 1, 6)]
"""(data degree, grad_accum, batch_size) of twelve streams."""


def ranks(split: tuple[int, int, int], source: Any = None, **options: Any) -> list[PackedLoader]:
    degree, accum, size = split
    shape = {"data_degree": degree, "grad_accum": accum, "batch_size": size}
    return [loader(source, data_rank=rank, **shape, **options) for rank in range(degree)]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_do_not_depend_on_the_split(split: tuple[int, int, int]) -> None:
    one, other = ranks(SPLITS[0]), ranks(split)
    for _ in range(5):
        assert torch.equal(step(one), step(other))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 25),
    st.sampled_from(SPLITS),
    st.sampled_from(SPLITS),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 8),
    st.booleans(),
)
def test_resume_is_exact(before, first, second, length, shuffle, min_tokens, prefetch) -> None:
    """At any step: within documents, at their ends, and epochs apart; saved by one split and loaded by another."""
    options = {"sequence_length": length, "shuffle": shuffle, "min_tokens": min_tokens, "seed": 3}
    saving = ranks(first, prefetch=prefetch, **options)
    for _ in range(before):
        step(saving)
    loading = ranks(second, prefetch=prefetch, **options)
    if before % 2:
        step(loading)  # a loader that has been used, too
    state = merged(saving)
    for rank in loading:
        rank.load_state_dict(state)
    assert merged(loading) == state
    for _ in range(4):
        assert torch.equal(step(saving), step(loading))


def test_prefetch_changes_nothing_but_the_time() -> None:
    plain, ahead = loader(), loader(prefetch=True)
    for _ in range(6):
        assert plain.state_dict() == ahead.state_dict()
        assert torch.equal(step([plain]), step([ahead]))


def test_prefetch_delivers_errors_with_their_step() -> None:
    class Failing(ByteTokenizer):
        def encode(self, text: str):
            if text.startswith("3"):
                raise UserError("bad document")
            return super().encode(text)

    texts = [str(i) * 4 for i in range(8)]
    packed = PackedLoader(
        MemorySource(texts, whole=True), Failing(), sequence_length=5, batch_size=1, vocab_size=257, prefetch=True
    )
    for _ in range(3):
        packed.next_step()
    state = packed.state_dict()
    assert state["streams"]["0"]["position"] == 3, "the step that cannot be read does not spoil the last position"
    with pytest.raises(UserError, match="bad document"):
        packed.next_step()


def test_streams_share_an_epoch_without_overlap() -> None:
    packed = loader(batch_size=4, sequence_length=40)
    heads: dict[int, Counter[int]] = {}
    for _ in range(12):
        batch = packed.next_step()[0]
        for row, first in (batch.positions == 0).nonzero().tolist():
            number = int(bytes(batch.input_ids[row, first : first + 2].clamp(max=255).tolist()).decode("latin-1"))
            heads.setdefault(row, Counter())[number] += 1
    training = set().union(*heads.values())
    held = loader(held_out=True, batch_size=1, sequence_length=400).next_step()[0]
    held_numbers = {
        bytes(held.input_ids[0, i : i + 2].tolist()).decode()
        for i in (held.positions[0] == 0).nonzero().flatten().tolist()
        if i < 398
    }
    assert training.isdisjoint(map(int, held_numbers))
    assert len(training) + len(held_numbers) == len(TEXTS)


def test_an_epoch_is_divided_among_the_streams() -> None:
    texts = [f"{i:03}" for i in range(41)]
    seen: Counter[str] = Counter()
    packed = loader(MemorySource(texts, whole=True), batch_size=3, sequence_length=4)
    first_epoch = {0: 14, 1: 14, 2: 13}
    for number in range(14):
        batch = packed.next_step()[0]
        for row in range(3):
            if number < first_epoch[row]:
                seen[bytes(batch.input_ids[row, :3].tolist()).decode()] += 1
    assert seen == Counter(texts)


def test_seed_and_epoch_change_the_order() -> None:
    first, second, again = (loader(seed=seed, batch_size=1, sequence_length=60) for seed in (0, 1, 0))
    one = step([first])
    assert not torch.equal(one, step([second]))
    assert torch.equal(one, step([again]))
    held = [loader(seed=0, held_out=True, batch_size=1, sequence_length=30) for _ in range(2)]
    assert torch.equal(step(held[:1]), step(held[1:]))


def test_reset_goes_back_to_the_start() -> None:
    for prefetch in (False, True):
        packed = loader(prefetch=prefetch)
        first = [step([packed]) for _ in range(3)]
        packed.reset()
        assert all(torch.equal(step([packed]), expected) for expected in first)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_resume_reads_local_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=4)
    saving = ranks((2, 3, 2), local_files([str(tmp_path)]))
    for _ in range(7):
        step(saving)
    loading = ranks((3, 4, 1), local_files([str(tmp_path)]))
    for rank in loading:
        rank.load_state_dict(merged(saving))
    for _ in range(5):
        assert torch.equal(step(saving), step(loading))


def test_standard_library_needs_no_configuration() -> None:
    packed = PackedLoader(standard_library(), ByteTokenizer(), sequence_length=256, batch_size=4, vocab_size=260)
    batch = packed.next_step()[0]
    assert batch.input_ids.shape == (4, 256)
    assert "stdlib" in packed.describe() and "training documents" in packed.describe()
    json.dumps(packed.state_dict())


# --- refusals


def test_a_resume_keeps_the_global_batch(refusal: Callable[..., str]) -> None:
    state = loader().state_dict()
    message = refusal(loader(batch_size=3).load_state_dict, state)
    assert message.startswith("a resume keeps the global batch: the checkpoint has 2 streams, this run 3")


def test_a_resume_keeps_the_data(tmp_path: Path, bpe_folder: Path, refusal: Callable[..., str]) -> None:
    state = loader().state_dict()
    for flag, options in {
        "--data.path or --data.dataset": {"source": MemorySource(TEXTS[:-1])},
        "--seed": {"seed": 1},
        "--data.shuffle": {"shuffle": False},
        "--data.holdout": {"holdout": 0.3},
        "--data.min-tokens": {"min_tokens": 4},
    }.items():
        message = refusal(loader(**options).load_state_dict, state)
        assert message.startswith(f"{flag} does not give the data of the checkpoint"), message
    other = load_tokenizer(str(bpe_folder))
    packed = PackedLoader(
        MemorySource(TEXTS), other, sequence_length=8, batch_size=2, vocab_size=other.vocab_size, holdout=0.2
    )
    assert refusal(packed.load_state_dict, state).startswith(
        "--data.tokenizer does not give the data of the checkpoint"
    )


def test_a_changed_file_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    running = loader(local_files([str(path)]))
    for _ in range(40):
        step([running])
    state = running.state_dict()
    path.write_text(path.read_text().replace("00", "11", 1))
    message = refusal(loader(local_files([str(path)])).load_state_dict, state)
    assert message.startswith("--data.path or --data.dataset does not give the data of the checkpoint (")


def test_a_longer_sequence_may_resume() -> None:
    packed = loader(sequence_length=8)
    step([packed])
    longer = loader(sequence_length=16)
    longer.load_state_dict(packed.state_dict())
    expected = torch.cat([step([packed]), step([packed])], dim=-1)
    assert torch.equal(step([longer]), expected)


def test_a_missing_stream_is_named(refusal: Callable[..., str]) -> None:
    first = loader(data_degree=2, data_rank=0).state_dict()
    message = refusal(loader(data_degree=2, data_rank=1).load_state_dict, first)
    assert "no data position for stream 2" in message


def test_a_document_that_shrank_is_named(refusal: Callable[..., str]) -> None:
    packed = loader(MemorySource(["abcdefghijklmn"], whole=True), batch_size=1)
    packed.next_step()
    shrunk = loader(MemorySource(["abc"], whole=True), batch_size=1)
    shrunk.load_state_dict(packed.state_dict())
    assert "document 0 is shorter than the position that the checkpoint holds" in refusal(shrunk.next_step)
