"""The carry of every stream and head is found again under any layout of ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.carry import carry_content, load_carry, write_carry
from pipeline.parallel.topology import Topology
from pipeline.system import Carry, CarryEntry

STREAMS, HEADS = 24, 4


def save_carry(folder: Path, carries: Sequence[Carry], streams: Sequence[Sequence[int]], topology: Topology) -> None:
    tensors, metadata = carry_content(carries, streams, topology)
    write_carry(tensors, folder / f"carry-{topology.rank:05d}.safetensors", metadata)


CPU = torch.device("cpu")

# name: (shape, stream dimension, head dimension, dtype); sizes at stream and head dimensions are the global ones.
ENTRIES = {
    "0.memory.memory": ((STREAMS, HEADS, 3, 2), 0, 1, torch.float32),
    "0.memory.tail": ((STREAMS, 3, HEADS, 2), 0, 2, torch.bfloat16),
    "0.memory.segments": ((STREAMS, 3), 0, None, torch.int64),
    "1.attention.k": ((STREAMS, 5, HEADS, 2), 0, 2, torch.float64),
    "context": ((2, STREAMS, HEADS), 1, 2, torch.float32),
    "position": ((STREAMS,), 0, None, torch.int64),
}


@dataclass(frozen=True)
class Layout:
    """data x sequence ranks, `accum` micro-batches of STREAMS / (data * accum) rows."""

    data: int
    sequence: int
    accum: int

    def ranks(self) -> list[Topology]:
        world = self.data * self.sequence
        return [Topology(rank=rank, world=world, sequence=self.sequence) for rank in range(world)]

    def streams(self, topology: Topology) -> list[range]:
        rows = STREAMS // (self.data * self.accum)
        first = topology.data_rank * self.accum
        return [range((first + micro) * rows, (first + micro + 1) * rows) for micro in range(self.accum)]


layouts = st.builds(Layout, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))


def whole(name: str, seed: int = 0) -> torch.Tensor:
    """The tensor of all streams and heads; every element is different, so nothing can be mistaken for another."""
    shape, _, _, dtype = ENTRIES[name]
    count = torch.Size(shape).numel()
    values = torch.randperm(count, generator=torch.Generator().manual_seed(seed + len(name)))
    return values.reshape(shape).to(dtype)


def part(name: str, streams: range, topology: Topology) -> torch.Tensor:
    """What a rank holds of it for one micro-batch."""
    _, stream_dim, heads_dim, _ = ENTRIES[name]
    rows = whole(name).index_select(stream_dim, torch.tensor(streams))
    if heads_dim is None:
        return rows
    mine = topology.heads(HEADS)
    return rows.narrow(heads_dim, mine.start, mine.stop - mine.start)


def write(folder: Path, layout: Layout) -> None:
    for topology in layout.ranks():
        streams = layout.streams(topology)
        carries: list[Carry] = [
            {name: CarryEntry(part(name, ids, topology), dims[1], dims[2]) for name, dims in ENTRIES.items()}
            for ids in streams
        ]
        save_carry(folder, carries, streams, topology)


def assert_found(folder: Path, layout: Layout) -> None:
    for topology in layout.ranks():
        streams = layout.streams(topology)
        carries = load_carry(folder, streams, topology, CPU)
        assert len(carries) == len(streams)
        for ids, carry in zip(streams, carries, strict=True):
            assert set(carry) == set(ENTRIES)
            for name, entry in carry.items():
                _, stream_dim, heads_dim, dtype = ENTRIES[name]
                assert (entry.streams, entry.heads, entry.tensor.dtype) == (stream_dim, heads_dim, dtype)
                torch.testing.assert_close(entry.tensor, part(name, ids, topology), rtol=0, atol=0)


@settings(max_examples=15, deadline=None)
@given(before=layouts, after=layouts)
def test_a_carry_saved_under_any_layout_is_found_under_any_other(before: Layout, after: Layout) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), before)
        assert_found(Path(folder), after)


def test_every_rank_has_its_own_file(tmp_path: Path) -> None:
    write(tmp_path, Layout(2, 2, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"carry-{rank:05d}.safetensors" for rank in range(4)]


def test_what_is_whole_on_every_sequence_rank_is_saved_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(tmp_path, Layout(1, 2, 1))
    with safe_open(tmp_path / "carry-00001.safetensors", framework="pt") as handle:
        assert sorted(handle.keys()) == sorted(f"0/{name}" for name, dims in ENTRIES.items() if dims[2] is not None)


def test_rows_follow_their_streams_and_not_their_place(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    save_carry(tmp_path, [{"x": CarryEntry(tensor)}], [[7, 2, 5]], Topology())
    for wanted in ([[5], [2, 7]], [[7, 2], [5]], [[5, 7], [2]]):
        found = [carry["x"].tensor.tolist() for carry in load_carry(tmp_path, wanted, Topology(), CPU)]
        assert found == [[[7, 2, 5].index(stream) for stream in ids] for ids in wanted]


def test_streams_that_were_never_saved_are_an_error(tmp_path: Path) -> None:
    save_carry(tmp_path, [{"x": CarryEntry(torch.zeros(2))}], [[0, 1]], Topology())
    with pytest.raises(KeyError):
        load_carry(tmp_path, [[1, 2]], Topology(), CPU)


def test_no_carry_is_no_carry(tmp_path: Path) -> None:
    assert load_carry(tmp_path, [range(2)], Topology(), CPU) == []
    save_carry(tmp_path, [{}], [range(2)], Topology())
    assert load_carry(tmp_path, [range(2)], Topology(), CPU) == []


def test_views_and_gradients_are_saved_as_values(tmp_path: Path) -> None:
    base = torch.arange(6.0, requires_grad=True)
    saved = {"a": CarryEntry(base.expand(2, 6)), "b": CarryEntry((2 * base).reshape(3, 2).T)}
    save_carry(tmp_path, [saved], [[0, 1]], Topology())
    (loaded,) = load_carry(tmp_path, [[0, 1]], Topology(), CPU)
    for name, entry in saved.items():
        assert torch.equal(loaded[name].tensor, entry.tensor.detach())
        assert loaded[name].tensor.is_contiguous() and not loaded[name].tensor.requires_grad
