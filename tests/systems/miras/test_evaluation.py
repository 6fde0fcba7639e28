"""What an evaluation finds is what the losses say, and a stop does not wait for the whole of it."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import replace
from pipeline.data.batch import IGNORED, Batch
from pipeline.data.synthetic import RecallLoader
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.runtime.stop import Stopped, StopRequests
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, StepContext
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.evaluated import reach
from pipeline.systems.miras.evaluation import GAP_BIN, OFF, ON, RATIO, evaluate
from pipeline.systems.miras.passages import PASSAGE, repeated_passages

MODES = {ON: True, OFF: False}
SIZES = miras_tiny().model
assert isinstance(SIZES, MirasConfig)
WINDOW = SIZES.attention.window


class System:
    """Held-out rows of two documents, HALF tokens each. A token costs `loss` of (memory on, position) nats."""

    backbone = types.SimpleNamespace(num_hidden_layers=4)
    sizes = SIZES

    def __init__(self, length: int, steps: int = 1, rows: int = 2) -> None:
        self.length, self.rows, self.forwards = length, rows, 0
        self.config = replace(miras_tiny(), sequence_length=length, evaluation__steps=steps)

    def loss(self, memory: bool, batch: Batch) -> Tensor:
        return torch.full(batch.labels.shape, 3.0)

    def held_out(self, topology: Topology) -> System:
        self.step = 0
        return self

    def next_step(self) -> Sequence[Batch]:
        half = self.length // 2
        ids = torch.arange(self.length).expand(self.rows, -1) % 7
        segments = (2 * self.step + (torch.arange(self.length) >= half)).expand(self.rows, -1)
        labels = torch.where(torch.arange(self.length) % half == half - 1, IGNORED, ids)
        positions = (torch.arange(self.length) % half).expand(self.rows, -1)
        self.step += 1
        return [Batch(ids, labels, segments, positions, torch.arange(self.rows))]

    def byte_lengths(self) -> Tensor:
        return torch.full((7,), 2.0)

    def forward(self, model: nn.Module, batch: Batch, carry: Carry, context: StepContext) -> types.SimpleNamespace:
        self.forwards += 1
        losses = self.loss(bool(context.options["memory"]), batch)
        return types.SimpleNamespace(tokens={"losses": losses}, carry={})


class Counting(SyncPoint):
    """Asks for a stop at the call after `calls`."""

    def __init__(self, calls: int) -> None:
        super().__init__(Topology(), StopRequests())
        self.calls = calls

    def __call__(
        self, place: str, problem: str | None = None, counts: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        assert self.requests is not None
        self.calls -= 1
        if self.calls < 0:
            self.requests.max_hours = 0
        return super().__call__(place, problem, counts)


@pytest.mark.parametrize("passages", [3, 4, 17])
def test_repeated_passages_are_left_between_any_two_forward_passes(passages: int) -> None:
    system, model = System(passages * PASSAGE), nn.Linear(1, 1)
    reading = 1
    whole = Counting(1000)
    curve = repeated_passages(system, model, whole, MODES)  # type: ignore[arg-type]
    assert curve is not None and system.forwards == len(MODES) * len(curve.x) == 1000 - whole.calls - reading
    for done in range(system.forwards):
        part = System(passages * PASSAGE)
        with pytest.raises(Stopped) as caught:
            repeated_passages(part, model, Counting(reading + done), MODES)  # type: ignore[arg-type]
        assert caught.value.signal is None and part.forwards == done


class Remembering(System):
    """With memory, what stands beyond the window costs half a nat less, and a copy two nats less than the passage."""

    def loss(self, memory: bool, batch: Batch) -> Tensor:
        losses = super().loss(memory, batch)
        if int((batch.labels != IGNORED).sum()) < batch.labels.numel() // 2:
            return losses - 2 * memory * (batch.positions >= PASSAGE)
        return losses - 0.5 * memory * (batch.positions >= WINDOW)


def test_perplexity_by_position_is_the_ratio_with_and_without_the_memory() -> None:
    evaluation = evaluate(Remembering(512, steps=3), nn.Linear(1, 1), SyncPoint(Topology()))  # type: ignore[arg-type]
    curve = evaluation.curves["perplexity_by_position"]
    labels, documents = 2 * 3 * 2 * 255, 2 * 3 * 2
    assert evaluation.scalars["labels"] == labels == sum(curve.counts)
    assert evaluation.scalars["documents"] == documents == curve.documents[0]
    assert evaluation.scalars["memory_off/loss"] == pytest.approx(3)
    assert evaluation.scalars["bpb"] == pytest.approx(evaluation.scalars["loss"] / math.log(2) / 2)
    assert curve.drawn == (RATIO,) and set(curve.series) == {ON, OFF, RATIO}
    for index, (edge, count) in enumerate(zip(curve.x, curve.counts, strict=True)):
        ratio = curve.series[RATIO][index]
        if count:
            assert ratio == pytest.approx(curve.series[OFF][index] / curve.series[ON][index])
            assert ratio == pytest.approx(1.0 if edge <= WINDOW else math.exp(0.5))
            low, high = (ends[index] for ends in curve.intervals[RATIO])
            assert low == pytest.approx(ratio) and high == pytest.approx(ratio), "all documents agree"
        else:
            assert math.isnan(ratio) and not curve.documents[index]
    assert curve.edges == {f"window of {WINDOW}": WINDOW, "reach of 4 layers": 4 * (WINDOW - 1)}
    assert curve.levels == {"no difference": 1.0}


def test_documents_that_differ_widen_the_interval() -> None:
    class Uneven(System):
        def loss(self, memory: bool, batch: Batch) -> Tensor:
            return super().loss(memory, batch) - memory * (0.1 + 0.2 * (batch.segment_ids % 2))

    evaluation = evaluate(Uneven(512, steps=4), nn.Linear(1, 1), SyncPoint(Topology()))  # type: ignore[arg-type]
    curve = evaluation.curves["perplexity_by_position"]
    low, high = (ends[0] for ends in curve.intervals[RATIO])
    assert math.exp(0.1) <= low < curve.series[RATIO][0] < high <= math.exp(0.3)


def test_recall_of_a_passage_is_what_the_copy_saves_against_the_first() -> None:
    curve = repeated_passages(Remembering(512), nn.Linear(1, 1), SyncPoint(Topology()), MODES)  # type: ignore[arg-type]
    assert curve is not None and curve.x == (64.0, 128.0, 256.0)
    assert curve.series[f"saved, {ON}"] == pytest.approx((2.0,) * 3) and curve.series[ON] == pytest.approx((1.0,) * 3)
    assert curve.series[f"saved, {OFF}"] == (0.0,) * 3 and curve.series[OFF] == pytest.approx((3.0,) * 3)
    assert curve.drawn == (f"saved, {ON}", f"saved, {OFF}") and curve.levels == {"nothing saved": 0.0}
    assert set(curve.counts) == {2 * 55} and set(curve.documents) == {2}
    # A token of the copy stands a gap and a passage behind itself, and is predicted a token sooner.
    assert curve.edges == {"window of 64": 1.0, "reach of 4 layers": 252 - 63}


def test_a_model_without_memory_has_its_own_perplexity_drawn() -> None:
    system = System(512)
    bare = dataclasses.replace(SIZES, memory=dataclasses.replace(SIZES.memory, layers=()))
    system.sizes = bare  # type: ignore[misc]
    evaluation = evaluate(system, nn.Linear(1, 1), SyncPoint(Topology()))  # type: ignore[arg-type]
    curve = evaluation.curves["perplexity_by_position"]
    assert set(curve.series) == {ON} and curve.drawn == () and not curve.levels and not curve.intervals
    assert set(evaluation.curves["recall_by_distance"].series) == {ON, f"saved, {ON}"}


def test_full_attention_has_no_edge() -> None:
    full = dataclasses.replace(SIZES, attention=dataclasses.replace(SIZES.attention, kind="full"))
    assert reach(full, 4) == {}
    assert reach(SIZES, 4, nearer=WINDOW) == {"reach of 4 layers": 252 - WINDOW}


def test_the_recall_task_shows_chance_and_reach() -> None:
    """On the loader of the task, with a model whose memory answers every query whose distance is even."""
    config = replace(miras_recall(), evaluation__steps=2)
    assert isinstance(config.model, MirasConfig) and config.model.recall is not None
    task = config.model.recall

    class Even:
        sizes, backbone = config.model, types.SimpleNamespace(num_hidden_layers=2)

        def __init__(self) -> None:
            self.config = config

        def held_out(self, topology: Topology) -> RecallLoader:
            return RecallLoader(task, sequence_length=config.sequence_length, batch_size=4, held_out=True)

        def forward(self, model: nn.Module, batch: Batch, carry: Mapping, context: StepContext) -> object:
            first = (batch.input_ids[:, None] == batch.input_ids[..., None]).long().argmax(-1)
            even = (torch.arange(batch.labels.shape[1]) - first - 1) % 2 == 0
            right = even & bool(context.options["memory"])
            return types.SimpleNamespace(
                tokens={"losses": torch.ones(batch.labels.shape), "predictions": torch.where(right, batch.labels, -1)},
                carry={},
            )

    evaluation = evaluate(Even(), nn.Linear(1, 1), SyncPoint(Topology()))  # type: ignore[arg-type]
    curve = evaluation.curves["recall_by_distance"]
    assert curve.levels == {"chance, 1 in 16": 1 / 16} and task.values == 16
    assert curve.edges == {"window of 32": 32.0, "reach of 2 layers": 62.0}
    assert evaluation.scalars["documents"] == 8 and sum(curve.counts) == 8 * task.queries
    answered = sum(share * count for share, count in zip(curve.series[ON], curve.counts, strict=True) if count)
    assert answered == pytest.approx(8 * task.queries * evaluation.scalars["recall"])
    assert 0 < evaluation.scalars["recall"] < 1 and evaluation.scalars["memory_off/recall"] == 0
    for index, count in enumerate(curve.counts):
        assert not count or task.min_gap < curve.x[index] <= task.max_gap + GAP_BIN
        low, high = (ends[index] for ends in curve.intervals[ON])
        assert not count or curve.documents[index] < 2 or 0 <= low <= curve.series[ON][index] <= high <= 1
