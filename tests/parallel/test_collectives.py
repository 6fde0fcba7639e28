"""All ranks stop with the same reason, and a step on which all is well costs one number."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.parallel import collectives as agreement
from pipeline.parallel.collectives import all_gather_object, broadcast_object, raise_together, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime import sync
from pipeline.runtime.sync import SyncPoint


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """Puts this process at rank 2 of three, whose other two have these problems; returns the calls that were made."""

    def make(*others: str | None) -> list[str]:
        calls: list[str] = []

        def all_gather_object(everyone: list[Any], mine: Any, group: Any) -> None:
            calls.append("texts")
            everyone[:] = [*others, mine]

        def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
            calls.append("numbers")
            assert op == dist.ReduceOp.MAX
            tensor[0] = max(int(tensor[0]), *(int(problem is not None) for problem in others))

        stand_in = types.SimpleNamespace(
            all_gather_object=all_gather_object, all_reduce=all_reduce, ReduceOp=dist.ReduceOp
        )
        monkeypatch.setattr(agreement, "dist", stand_in)
        monkeypatch.setattr(sync, "dist", stand_in)
        return calls

    return make


PLACE = Topology(rank=2, world=3)


def test_one_rank_agrees_with_itself() -> None:
    raise_together(Topology(), None)
    SyncPoint(Topology())("here")
    for call in (lambda: raise_together(Topology(), "broken"), lambda: SyncPoint(Topology())("here", "broken")):
        with pytest.raises(UserError, match=r"^broken$"):
            call()
    assert broadcast_object(Topology(), 3) == 3
    assert all_gather_object(Topology(), 3) == [3]


@pytest.mark.parametrize("mine", [None, "rank 2 is full"])
def test_the_first_ranks_problem_is_everyones(world, mine: str | None) -> None:
    world(None, "rank 1 is full")
    for call in (lambda: raise_together(PLACE, mine), lambda: SyncPoint(PLACE)("here", mine)):
        with pytest.raises(UserError, match=r"^rank 1 is full$"):
            call()


def test_ones_own_problem_is_enough(world) -> None:
    world(None, None)
    with pytest.raises(UserError, match=r"^rank 2 is full$"):
        SyncPoint(PLACE)("here", "rank 2 is full")


def test_where_all_is_well_no_texts_travel(world) -> None:
    calls = world(None, None)
    SyncPoint(PLACE)("here")
    assert calls == ["numbers"]
    raise_together(PLACE, None)
    assert calls == ["numbers", "texts"]


def test_everyone_takes_the_first_ranks_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(box: list[Any], src: int, group: Any) -> None:
        assert src == 0
        box[0] = "from rank 0"

    monkeypatch.setattr(agreement, "dist", types.SimpleNamespace(broadcast_object_list=broadcast))
    assert broadcast_object(PLACE, "mine") == "from rank 0"


def test_a_file_that_cannot_be_read_is_a_problem_like_any_other() -> None:
    with pytest.raises(UserError, match=r"^shard\.pt: Permission denied: fix it"), shared_errors(Topology()):
        raise PermissionError(13, "Permission denied", "shard.pt")


def test_another_ranks_problem_ends_the_block_here_too(world) -> None:
    calls = world(None, "rank 1 is full")
    done = False
    with pytest.raises(UserError, match=r"^rank 1 is full$"), shared_errors(PLACE):
        done = True
    assert done and calls == ["texts"]


def test_what_is_no_users_error_is_told_to_nobody(world) -> None:
    calls = world(None, None)
    with pytest.raises(KeyError), shared_errors(PLACE):
        raise KeyError("a bug")
    assert calls == []
