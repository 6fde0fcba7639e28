"""An evaluation is long at full length: a stop does not wait for the whole of it."""

from __future__ import annotations

import types
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from pipeline.parallel.pulse import Pulse
from pipeline.parallel.topology import Topology
from pipeline.stop import Stopped, StopRequests
from pipeline.system import Batch
from pipeline.systems.miras.evaluation import PASSAGE, _repeated_passages

MODES = {"memory on": True, "memory off": False}


class System:
    """Held-out rows of LENGTH tokens; counts what is run on them."""

    def __init__(self, length: int) -> None:
        self.length, self.forwards = length, 0
        self.config = types.SimpleNamespace(seed=0)

    def held_out(self, topology: Topology) -> System:
        return self

    def next_step(self) -> Sequence[Batch]:
        rows = torch.zeros(2, self.length, dtype=torch.long)
        return [Batch(rows, rows, rows, rows, torch.arange(2))]

    def forward(self, *_: object) -> types.SimpleNamespace:
        self.forwards += 1
        return types.SimpleNamespace(sums={"cross_entropy": torch.tensor(3.0)})


class Counting(Pulse):
    """Asks for a stop at the call after `calls`."""

    def __init__(self, calls: int) -> None:
        super().__init__(Topology(), StopRequests())
        self.calls = calls

    def __call__(self, place: str, problem: str | None = None) -> None:
        assert self.requests is not None
        self.calls -= 1
        if self.calls < 0:
            self.requests.max_hours = 0
        super().__call__(place, problem)


@pytest.mark.parametrize("passages", [3, 4, 17])
def test_repeated_passages_are_left_between_any_two_forward_passes(passages: int) -> None:
    system, model = System(passages * PASSAGE), nn.Linear(1, 1)
    reading = 1
    whole = Counting(1000)
    curve = _repeated_passages(system, model, whole, MODES)  # type: ignore[arg-type]
    assert curve is not None and system.forwards == len(MODES) * len(curve.x) == 1000 - whole.calls - reading
    for done in range(system.forwards):
        part = System(passages * PASSAGE)
        with pytest.raises(Stopped) as caught:
            _repeated_passages(part, model, Counting(reading + done), MODES)  # type: ignore[arg-type]
        assert caught.value.signal is None and part.forwards == done
