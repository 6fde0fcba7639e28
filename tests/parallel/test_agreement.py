"""All ranks stop with the same reason, and a step on which all is well costs one number."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.parallel import agreement
from pipeline.parallel.agreement import agree, agree_quickly, from_main
from pipeline.parallel.topology import Topology

CPU = torch.device("cpu")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """Puts this process at rank 2 of three, whose other two have these problems; returns the calls that were made."""

    def make(*others: str | None) -> list[str]:
        calls: list[str] = []

        def all_gather_object(everyone: list[Any], mine: Any) -> None:
            calls.append("texts")
            everyone[:] = [*others, mine]

        def all_reduce(tensor: torch.Tensor) -> None:
            calls.append("number")
            tensor += sum(problem is not None for problem in others)

        stand_in = types.SimpleNamespace(all_gather_object=all_gather_object, all_reduce=all_reduce)
        monkeypatch.setattr(agreement, "dist", stand_in)
        return calls

    return make


PLACE = Topology(rank=2, world=3)


def test_one_rank_agrees_with_itself() -> None:
    agree(Topology(), None)
    agree_quickly(Topology(), None, CPU)
    for call in (lambda: agree(Topology(), "broken"), lambda: agree_quickly(Topology(), "broken", CPU)):
        with pytest.raises(UserError, match=r"^broken$"):
            call()
    assert from_main(Topology(), 3) == 3


@pytest.mark.parametrize("mine", [None, "rank 2 is full"])
def test_the_first_ranks_problem_is_everyones(world, mine: str | None) -> None:
    world(None, "rank 1 is full")
    for call in (lambda: agree(PLACE, mine), lambda: agree_quickly(PLACE, mine, CPU)):
        with pytest.raises(UserError, match=r"^rank 1 is full$"):
            call()


def test_ones_own_problem_is_enough(world) -> None:
    world(None, None)
    with pytest.raises(UserError, match=r"^rank 2 is full$"):
        agree_quickly(PLACE, "rank 2 is full", CPU)


def test_where_all_is_well_no_texts_travel(world) -> None:
    calls = world(None, None)
    agree_quickly(PLACE, None, CPU)
    assert calls == ["number"]
    agree(PLACE, None)
    assert calls == ["number", "texts"]


def test_everyone_takes_the_first_ranks_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(box: list[Any], src: int) -> None:
        assert src == 0
        box[0] = "from rank 0"

    monkeypatch.setattr(agreement, "dist", types.SimpleNamespace(broadcast_object_list=broadcast))
    assert from_main(PLACE, "mine") == "from rank 0"
