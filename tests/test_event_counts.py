"""High gradient norms, skipped updates and restarts of streams, in the rows of a system that names them alone."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from pipeline.config import replace
from pipeline.engine import StepResult
from pipeline.event_counts import EventCounts
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Progress, Run
from pipeline.system import Phase
from pipeline.update_events import UpdateEvents


class Named:
    def event_metrics(self, events: UpdateEvents) -> Mapping[str, Any]:
        return {"high": events.high_norms, "skipped": events.skipped, "restarts": events.restarts}


def run_of(system: Any, *cursors: Mapping[str, Any], skipped: int = 0, clip: float = 2.0) -> Run:
    """A run of streams at `cursors`."""
    loader: Any = types.SimpleNamespace(
        state_dict=lambda: {"fingerprint": {}} | ({"streams": dict(enumerate(cursors))} if cursors else {"windows": 3})
    )
    engine: Any = None
    config = replace(miras_tiny(), clip=clip)
    progress = Progress(skipped=skipped)
    phase = Phase("train", 1, ())
    return Run(config, Topology(), torch.device("cpu"), system, phase, engine, loader, {}, progress=progress)


def result(norm: float) -> StepResult:
    return StepResult(norm, not math.isfinite(norm), 1e-3)


def test_events_are_counted_up_to_the_row() -> None:
    counts = EventCounts(run_of(Named(), {"epoch": 2}, {"epoch": 0}, {"epoch": 1}, skipped=3))
    for norm in (0.1, 1.89, 1.91, 50.0, math.nan):
        counts.add(result(norm))
    assert counts.metrics() == {"high": 2 / 5, "skipped": 4, "restarts": 3}
    counts.add(result(0.5))
    assert counts.metrics() == {"high": 0, "skipped": 4, "restarts": 3}


@pytest.mark.parametrize("cursors", [(), ({"document": 4, "offset": 1},)], ids=["windows", "generated"])
def test_a_loader_that_counts_no_restarts_has_none(cursors: tuple[Mapping[str, Any], ...]) -> None:
    counts = EventCounts(run_of(Named(), *cursors))
    counts.add(result(1.0))
    assert counts.metrics()["restarts"] is None


def test_without_a_clip_no_norm_is_high() -> None:
    counts = EventCounts(run_of(Named(), {"epoch": 0}, clip=0.0))
    counts.add(result(1e9))
    assert counts.metrics()["high"] == 0


def test_restarts_are_of_the_streams_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that share a sequence have the same streams, which count once."""
    run = run_of(Named(), {"epoch": 1}, {"epoch": 2})
    run.topology = Topology(world=4, sequence=2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(4))
    assert EventCounts(run).metrics()["restarts"] == 6


def test_a_system_without_names_has_none() -> None:
    counts = EventCounts(run_of(object(), {"epoch": 2}))
    counts.add(result(9.0))
    assert counts.metrics() == {}
