"""All ranks stop with the same reason, and a step on which all is well costs one number."""

from __future__ import annotations

import signal
import types
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.parallel import collectives as agreement
from pipeline.parallel.collectives import all_gather_object, broadcast_object, raise_together, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime import sync
from pipeline.runtime.stop import DEADLINE, REQUESTS, Stopped
from pipeline.runtime.sync import MAX_TERMS, SyncPoint, next_counted_step


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """Puts this process at rank 2 of three, whose other two have these problems; returns the calls that were made."""

    def make(*others: str | None) -> list[str]:
        calls: list[str] = []

        def all_gather_object(everyone: list[Any], mine: Any, group: Any) -> None:
            calls.append("texts")
            everyone[:] = [*others, mine]

        def all_reduce(tensor: torch.Tensor, group: Any) -> None:
            calls.append("numbers")
            tensor[0] += sum(problem is not None for problem in others)

        stand_in = types.SimpleNamespace(all_gather_object=all_gather_object, all_reduce=all_reduce)
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


def ranks_that_ask(monkeypatch: pytest.MonkeyPatch, *others: int) -> None:
    """The other ranks of a world have these requests to stop, and 10 labels each."""

    def all_reduce(tensor: torch.Tensor, group: Any) -> None:
        for request in others:
            tensor[1:4] += torch.tensor([int(request == each) for each in REQUESTS])
            tensor[4] += 10

    monkeypatch.setattr(sync, "dist", types.SimpleNamespace(all_reduce=all_reduce))


def test_the_gravest_request_of_all_ranks_stops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        (DEADLINE, 0): "--max-hours",
        (signal.SIGINT, DEADLINE): "SIGINT",
        (signal.SIGINT, signal.SIGTERM): "SIGTERM",
        (signal.SIGTERM, signal.SIGTERM): "SIGTERM",
    }
    for others, expected in cases.items():
        ranks_that_ask(monkeypatch, *others)
        with pytest.raises(Stopped, match=expected):
            SyncPoint(PLACE)("here", counts={"ce": 1})


def test_what_a_step_counts_travels_with_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that_ask(monkeypatch, 0, 0)
    assert SyncPoint(PLACE)("here", counts={"ce": 7}) == {"ce": 27.0}
    assert SyncPoint(PLACE)("here") == {}


def test_more_loss_terms_than_are_sent_are_refused() -> None:
    many = {f"term {index}": 1 for index in range(MAX_TERMS)}
    assert SyncPoint(Topology())("here", counts=many) == many
    with pytest.raises(ValueError, match="17 loss terms"):
        SyncPoint(Topology())("here", counts={**many, "one more": 1})


def test_a_batch_that_one_rank_cannot_count_stops_all() -> None:
    def fails(batch: object) -> dict[str, int]:
        raise UserError(f"batch {batch} has no labels")

    loader = types.SimpleNamespace(next_step=lambda: [1, 2])
    with pytest.raises(UserError, match="batch 1 has no labels"):
        next_counted_step(loader, SyncPoint(Topology()), "here", fails)  # type: ignore[arg-type]
    found = next_counted_step(loader, SyncPoint(Topology()), "here", lambda batch: {"ce": 5})  # type: ignore[arg-type]
    assert found == ([1, 2], {"ce": 10})


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
