"""Every rank has its place, and the parts of a sequence or of heads make up the whole."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.parallel import topology as module
from pipeline.parallel.topology import Topology, check_degrees, create_topology


def ranks(data: int, sequence: int) -> list[Topology]:
    return [Topology(rank=rank, world=data * sequence, sequence=sequence) for rank in range(data * sequence)]


def test_one_rank_is_everything() -> None:
    alone = Topology()
    assert (alone.data, alone.data_rank, alone.sequence_rank) == (1, 0, 0)
    assert alone.shard(10) == alone.heads(10) == slice(0, 10)


@given(st.integers(1, 8), st.integers(1, 8))
def test_ranks_are_data_times_sequence_with_sequence_ranks_side_by_side(data: int, sequence: int) -> None:
    places = [(rank.data_rank, rank.sequence_rank) for rank in ranks(data, sequence)]
    assert places == [(d, s) for d in range(data) for s in range(sequence)]
    assert all(rank.data == data for rank in ranks(data, sequence))


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 16))
def test_the_parts_of_a_group_are_the_whole_in_order(data: int, sequence: int, part: int) -> None:
    whole = list(range(part * sequence))
    for group in range(data):
        members = ranks(data, sequence)[group * sequence : (group + 1) * sequence]
        assert [token for rank in members for token in whole[rank.shard(len(whole))]] == whole
        assert [head for rank in members for head in whole[rank.heads(len(whole))]] == whole


@given(st.integers(1, 16), st.integers(1, 16))
def test_a_degree_must_divide_the_ranks(world: int, sequence: int) -> None:
    if world % sequence == 0:
        check_degrees(world, sequence)
    else:
        with pytest.raises(UserError, match=rf"--parallel\.sequence {sequence} does not divide the {world} ranks"):
            check_degrees(world, sequence)


def create(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, sequence: int) -> tuple[Topology, list[list[int]]]:
    """The topology of a rank, and the groups it created on the way (every rank must create all, in the same order)."""
    created: list[list[int]] = []

    def new_group(members: list[int], timeout: object) -> tuple[int, ...]:
        created.append(members)
        return tuple(members)

    stand_in = types.SimpleNamespace(
        get_world_size=lambda: world, get_rank=lambda: rank, new_group=new_group, get_backend=lambda: "gloo",
        Backend=torch.distributed.Backend,
    )  # fmt: skip
    monkeypatch.setattr(module, "dist", stand_in)
    return create_topology(sequence, local_rank=3, nodes=2), created


@pytest.mark.parametrize("rank", range(6))
def test_a_rank_shares_its_sequences_with_its_neighbours(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    place, created = create(monkeypatch, rank, world=6, sequence=2)
    assert created == [[0, 1], [2, 3], [4, 5]]
    assert place.sequence_group == tuple(created[rank // 2])
    assert (place.rank, place.world, place.sequence, place.local_rank, place.nodes) == (rank, 6, 2, 3, 2)


def test_without_sequence_ranks_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    place, created = create(monkeypatch, 1, world=4, sequence=1)
    assert (created, place.sequence_group) == ([], None)


def test_no_group_is_created_for_ranks_that_cannot_be_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError):
        create(monkeypatch, 0, world=6, sequence=4)
