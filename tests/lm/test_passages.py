"""A passage of held-out text that comes again: what its copy costs less, and where a stop is heeded."""

from __future__ import annotations

import pytest
from torch import nn

from pipeline.lm.passages import PASSAGE, repeated_passages
from pipeline.parallel.topology import Topology
from pipeline.runtime.stop import Stopped
from pipeline.runtime.sync import SyncPoint
from tests.lm.systems import EDGES, MODES, OFF, ON, PHASE, Counting, Remembering, System


@pytest.mark.parametrize("passages", [3, 4, 17])
def test_repeated_passages_are_left_between_any_two_forward_passes(passages: int) -> None:
    system, model = System(passages * PASSAGE), nn.Linear(1, 1)
    reading = 1
    whole = Counting(1000)
    curve = repeated_passages(system, model, PHASE, whole, MODES, edges=EDGES)  # type: ignore[arg-type]
    assert curve is not None and system.forwards == len(MODES) * len(curve.x) == 1000 - whole.calls - reading
    for done in range(system.forwards):
        part = System(passages * PASSAGE)
        with pytest.raises(Stopped) as caught:
            repeated_passages(part, model, PHASE, Counting(reading + done), MODES, edges=EDGES)  # type: ignore[arg-type]
        assert caught.value.signal is None and part.forwards == done


def test_recall_of_a_passage_is_what_the_copy_saves_against_the_first() -> None:
    curve = repeated_passages(
        Remembering(512), nn.Linear(1, 1), PHASE, SyncPoint(Topology()), MODES, edges=EDGES,  # type: ignore[arg-type]
    )  # fmt: skip
    assert curve is not None and curve.x == (64.0, 128.0, 256.0)
    assert curve.series[f"saved, {ON}"] == pytest.approx((2.0,) * 3) and curve.series[ON] == pytest.approx((1.0,) * 3)
    assert curve.series[f"saved, {OFF}"] == (0.0,) * 3 and curve.series[OFF] == pytest.approx((3.0,) * 3)
    assert curve.drawn == (f"saved, {ON}", f"saved, {OFF}") and curve.levels == {"nothing saved": 0.0}
    assert set(curve.counts) == {2 * 55} and set(curve.documents) == {2}
    # A token of the copy stands a gap and a passage behind itself, and is predicted a token sooner.
    assert curve.edges == {"window of 64": 1.0, "reach of 4 layers": 252 - 63}


def test_an_edge_that_lies_within_a_passage_is_none() -> None:
    edges = {"near": float(PASSAGE - 1), "far": float(PASSAGE)}
    curve = repeated_passages(
        System(512), nn.Linear(1, 1), PHASE, SyncPoint(Topology()), {"model": {}}, edges=edges,  # type: ignore[arg-type]
    )  # fmt: skip
    assert curve is not None and curve.edges == {"far": 1.0} and set(curve.series) == {"model", "saved, model"}
