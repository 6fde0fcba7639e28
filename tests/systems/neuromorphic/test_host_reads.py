"""No value of the device is read on the host in a step that is not logged: no host waits in the loop of the spans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.systems.neuromorphic.memory.procedural import ProceduralMemory
from tests.systems.neuromorphic.harness import created, documents, small
from tests.systems.neuromorphic.host_reads import HostRead, NoHostReads, steps_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(("phase", "recompute"), [("A", False), ("B", False), ("C", False), ("C", True)])
def test_no_step_reads_the_device(tmp_path: Path, phase: str, recompute: bool) -> None:
    documents(tmp_path / "documents")
    run = steps_of(created(small(tmp_path, activation_checkpointing=recompute)), phase, CPU)
    run()
    with NoHostReads() as mode:
        run()
        run()
    assert {"bmm", "embedding_dense_backward", "tanh_backward"} <= mode.seen, "both passes were looked at"
    assert ("sort" in mode.seen) == (phase != "A"), "candidates are chosen where the episodic memory is written"


class ReadBehind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * gradient.abs().max().item()


def _item(strengths: Tensor) -> Tensor:
    return strengths if strengths.sum().item() >= 0 else -strengths


def _mask(strengths: Tensor) -> Tensor:
    strengths[strengths > 0].sum()
    return strengths


@pytest.mark.parametrize("read", [_item, _mask, ReadBehind.apply], ids=["item", "mask", "backward"])
def test_a_read_in_the_loop_of_the_spans_is_found(tmp_path: Path, monkeypatch, read) -> None:
    documents(tmp_path / "documents")
    run = steps_of(created(small(tmp_path)), "B", CPU)
    penalty = ProceduralMemory.penalty
    monkeypatch.setattr(ProceduralMemory, "penalty", lambda self, state: read(penalty(self, state)))
    run()
    with NoHostReads(), pytest.raises(HostRead):
        run()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.masked_select(x > 0), torch.unique,
        torch.unique_consecutive, lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.cpu(), lambda x: x[x > 0],
        lambda x: torch.equal(x, x), lambda x: torch.where(x > 0), lambda x: float(x[0]), lambda x: range(x[0]),
        lambda x: x.repeat_interleave(x), lambda x: x.index_put((x > 0,), x[0]),
    ],
)  # fmt: skip
def test_what_reads_a_value_is_found(read) -> None:
    with NoHostReads(), pytest.raises(HostRead):
        read(torch.arange(3))
