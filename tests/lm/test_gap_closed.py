"""Gap closed says what was remembered: of models whose memory is known, the losses and what follows from them."""

from __future__ import annotations

import dataclasses
import math
import types
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import replace
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.lm.gap_closed import GapModes, measure_gap
from pipeline.lm.gap_report import CLOSED, CLOSED_EQUAL, CLOSED_OWN, LABELS, SWAP, WORTH
from pipeline.lm.whole_documents import Document, grouped, pieces
from pipeline.parallel.topology import Topology
from pipeline.runtime.stop import Stopped
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, CarryEntry, Evaluation, Phase, StepContext
from tests.lm.systems import PHASE, Counting, config

WINDOW = 8
PERIOD = 12
"""Tokens after which a document repeats itself: further back than the window."""
VOCABULARY = 50
UNKNOWN = math.log(VOCABULARY)
CERTAIN = 0.1
"""Nats of a token that is copied."""
WRONG = 7.0
"""Nats of a token that is not what was copied."""


def modes(*, full: bool = True, **changes: Any) -> GapModes:
    found = {
        "window": {"memory": False},
        "memory": {"memory": True},
        "emptied": {"memory": True, "emptied": True},
        "equal": {"memory": False, "longer": True},
        "full": (lambda longest: {"memory": False, "full": longest}) if full else None,
        "reach": 4096,
    }
    return GapModes(WINDOW, **{**found, **changes}, is_state=lambda name: name == "memory")  # type: ignore[arg-type]


class Packed:
    """Streams of documents of the given lengths, each a random period repeated, packed into steps of `length`."""

    def __init__(self, lengths: Sequence[Sequence[int]], length: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.length = length
        steps = min(sum(row) for row in lengths) // length
        self.config = replace(config(length, steps), evaluation__batch_size=len(lengths))
        self.rows = []
        for row in lengths:
            documents = [
                torch.randint(VOCABULARY, (PERIOD,), generator=draw).repeat(-(-size // PERIOD))[:size] for size in row
            ]
            labels = [torch.cat([ids[1:], torch.tensor([IGNORED])]) for ids in documents]
            segments = [torch.full((size,), index) for index, size in enumerate(row)]
            positions = [torch.arange(size) for size in row]
            self.rows.append([torch.cat(parts) for parts in (documents, labels, segments, positions)])

    def held_out(self, phase: Phase, topology: Topology) -> Packed:
        self.step = 0
        return self

    def next_step(self) -> list[TokenBatch]:
        here = slice(self.step * self.length, (self.step + 1) * self.length)
        self.step += 1
        columns = [torch.stack([row[column][here] for row in self.rows]) for column in range(4)]
        return [TokenBatch(*columns, torch.arange(len(self.rows)))]


class Copier(Packed):
    """Its memory holds what it has read of the period, and it predicts what stood there a period before; of the nats
    that this saves, it saves the share `skill`."""

    skill = 1.0

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> types.SimpleNamespace:
        options = context.options
        reads = bool(options["memory"]) or "full" in options or "longer" in options
        rows, length = batch.input_ids.shape
        state = carry["memory"].tensor.clone() if carry else torch.full((rows, PERIOD), -1)
        losses = torch.full((rows, length), UNKNOWN)
        for row in range(rows):
            for place in range(length):
                position = int(batch.positions[row, place])
                border = position % WINDOW == 0 and bool(options.get("emptied"))
                if position == 0 or border:
                    state[row] = -1
                state[row, position % PERIOD] = batch.input_ids[row, place]
                predicted = int(state[row, (position + 1) % PERIOD])
                if reads and predicted >= 0:
                    label = int(batch.labels[row, place])
                    nats = CERTAIN if predicted == label else WRONG
                    skill = self.skill if options["memory"] else 0.5 if "longer" in options else 1.0
                    losses[row, place] = UNKNOWN + skill * (nats - UNKNOWN)
        return types.SimpleNamespace(tokens={"losses": losses}, carry={"memory": CarryEntry(state)})


class Adapted(Packed):
    """Knows the domain with its memory, emptied or not: half of what full attention gains, everywhere. Noise, another
    one in every mode and at every token, is all that tells the modes apart."""

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> types.SimpleNamespace:
        mean = 2.5 if context.options["memory"] else 2.0 if "full" in context.options else 3.0
        told = (sorted(context.options.items()), batch.streams.tolist(), int(batch.positions[0, 0]))
        noise = torch.randn(
            batch.labels.shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(told).encode()))
        )
        hard = 0.5 * torch.sin(3.0 * batch.streams + 5.0)[:, None]
        state = CarryEntry(torch.zeros(batch.rows, 1))
        return types.SimpleNamespace(tokens={"losses": mean + hard + 0.3 * noise}, carry={"memory": state})


def measured(system: Packed, given: GapModes | None = None, sync_point: SyncPoint | None = None) -> Evaluation:
    return measure_gap(
        system, nn.Linear(1, 1), PHASE, sync_point or SyncPoint(Topology()), given or modes(),  # type: ignore[arg-type]
    )  # fmt: skip


LENGTHS = [[30, 5, 45], [44, 36], [5, 75]]
"""Documents of three streams; those of 5 tokens are shorter than the window."""


def expected(lengths: Sequence[Sequence[int]], copied: float) -> tuple[float, int]:
    """Mean nats of the labels beyond the window where one that was seen a period before costs `copied`."""
    sizes = [size for row in lengths for size in row if size > WINDOW + 1]
    first = sum(max(0, PERIOD - 1 - WINDOW) for _ in sizes)
    labels = sum(size - 1 - WINDOW for size in sizes)
    return (first * UNKNOWN + (labels - first) * copied) / labels, labels


@pytest.mark.parametrize("length", [16, 40, 80])
@pytest.mark.parametrize("skill", [1.0, 0.25])
def test_a_model_that_copies_from_its_memory_closes_the_gap_by_its_skill(length: int, skill: float) -> None:
    system = Copier(LENGTHS, length)
    system.skill = skill
    evaluation = measured(system)
    scalars = evaluation.scalars
    full, labels = expected(LENGTHS, CERTAIN)
    memory, _ = expected(LENGTHS, UNKNOWN + skill * (CERTAIN - UNKNOWN))
    assert scalars["gap/labels"] == labels and scalars["gap/documents"] == 5
    assert scalars["gap/loss_window"] == pytest.approx(UNKNOWN)
    assert scalars["gap/loss_emptied"] == pytest.approx(UNKNOWN), "a window holds no whole period"
    assert scalars["gap/loss_full"] == pytest.approx(full)
    assert scalars["gap/loss_memory"] == pytest.approx(memory)
    assert scalars["gap/closed"] == pytest.approx(skill)
    assert scalars["gap/closed_own"] == pytest.approx(skill), "another document's state is no control that helps"
    assert scalars["gap/closed_equal"] == pytest.approx(0.5), "whatever the memory does"
    for end in ("_low", "_high"):
        assert scalars[f"gap/closed{end}"] == pytest.approx(skill), "every document says the same"
    assert scalars["gap/worth"] == pytest.approx(UNKNOWN - memory)
    assert scalars["gap/worth_low"] <= scalars["gap/worth"] <= scalars["gap/worth_high"]
    # What another document had there is nearly never what comes.
    assert scalars["gap/loss_swapped"] > UNKNOWN + 0.5 * skill * (WRONG - UNKNOWN) * 0.9


def test_the_curves_have_every_loss_and_what_follows_by_position() -> None:
    evaluation = measured(Copier(LENGTHS, 40))
    losses = evaluation.curves["loss_beyond_window"]
    assert list(losses.series) == list(LABELS.values()) == list(losses.intervals)
    assert losses.x == tuple(float(WINDOW * 2**index) for index in range(5)) and losses.edges == {"window of 8": 8.0}
    assert losses.documents[:3] == (5, 5, 5) and losses.documents[-1] == 1
    # Of documents that go beyond the window, and of their first labels too.
    assert sum(losses.counts) == 30 + 45 + 44 + 36 + 75 - 5
    for series in losses.series.values():
        assert series[0] == pytest.approx(UNKNOWN)
    closed = evaluation.curves["gap_closed"]
    assert closed.series[CLOSED_EQUAL][1:] == pytest.approx([0.5] * 4)
    assert closed.series[CLOSED][1:] == pytest.approx([1.0] * 4) and math.isnan(closed.series[CLOSED][0])
    assert all(math.isnan(end) for end in (closed.intervals[CLOSED][0][-1], closed.intervals[CLOSED][1][-1]))
    worth = evaluation.curves["worth_of_remembering"]
    assert set(worth.series) == {WORTH, SWAP} and worth.series[WORTH][-1] == pytest.approx(UNKNOWN - CERTAIN)


@pytest.mark.parametrize("reach, shown", [(64, {"full attention of 64": 64.0}), (128, {})])
def test_the_reach_of_full_attention_is_shown_where_documents_are_longer(reach: int, shown: dict[str, float]) -> None:
    """The last bin ends at position 128."""
    losses = measured(Copier(LENGTHS, 40), modes(reach=reach)).curves["loss_beyond_window"]
    assert losses.edges == {"window of 8": 8.0, **shown}
    assert measured(Copier(LENGTHS, 40), modes(full=False, reach=reach)).curves["worth_of_remembering"].edges == {
        "window of 8": 8.0
    }


def test_a_model_that_adapts_by_what_it_reads_closes_nothing_of_its_own() -> None:
    """Anything in memory lowers its loss, as of trained weights that read it: an emptied one shows nothing of that."""

    class Reads(Copier):
        def forward(self, model: Any, batch: Any, carry: Any, context: StepContext) -> types.SimpleNamespace:
            found = super().forward(model, batch, carry, context)
            if context.options["memory"] and not context.options.get("emptied"):
                found.tokens["losses"] = torch.full(batch.labels.shape, UNKNOWN - 1.0)
            return found

    evaluation = measured(Reads(LENGTHS, 40))
    full, _ = expected(LENGTHS, CERTAIN)
    assert evaluation.scalars["gap/closed"] == pytest.approx(1 / (UNKNOWN - full))
    assert evaluation.scalars["gap/closed_own"] == pytest.approx(0)
    assert evaluation.curves["gap_closed"].series[CLOSED_OWN][1:] == pytest.approx([0.0] * 4)


def test_a_model_that_only_adapts_closes_nothing() -> None:
    evaluation = measured(Adapted([[70, 30, 100]] * 20, 40))
    found = evaluation.scalars
    credited = (found["gap/loss_window"] - found["gap/loss_memory"]) / (
        found["gap/loss_window"] - found["gap/loss_full"]
    )
    assert credited == pytest.approx(0.5, abs=0.03), "memory off against on takes it for half of the gap"
    assert found["gap/closed_low"] <= 0 <= found["gap/closed_high"]
    assert 0 < found["gap/closed_high"] - found["gap/closed_low"] < 0.06
    assert found["gap/worth_low"] <= 0 <= found["gap/worth_high"]
    assert found["gap/swap_cost_low"] <= 0 <= found["gap/swap_cost_high"]


def test_what_the_emptied_model_loses_to_the_window_is_no_gain_of_memory() -> None:
    class Relying(Adapted):
        """Emptied, it is worse than its backbone."""

        def forward(self, model: Any, batch: Any, carry: Any, context: StepContext) -> types.SimpleNamespace:
            found = super().forward(model, batch, carry, context)
            found.tokens["losses"] = found.tokens["losses"] + 2.0 * bool(context.options.get("emptied"))
            return found

    found = measured(Relying([[70, 30, 100]] * 20, 40)).scalars
    assert found["gap/closed"] == pytest.approx(0.5, abs=0.03) and found["gap/worth"] == pytest.approx(2, abs=0.03)


def test_where_full_attention_gains_nothing_there_is_no_gap_to_close() -> None:
    same = modes(full=False)
    found = measured(Copier(LENGTHS, 40), same).scalars
    assert "gap/closed" not in found and "gap/loss_full" not in found and found["gap/worth"] > 0
    blind = modes()
    found = measured(
        Copier(LENGTHS, 40), dataclasses.replace(blind, full=lambda longest: blind.window, equal=None)
    ).scalars
    assert math.isnan(found["gap/closed"]) and math.isnan(found["gap/closed_low"])


def test_an_attachment_that_is_always_empty_without_its_memory_is_run_once_for_both() -> None:
    runs: list[Mapping[str, Any]] = []

    class Noted(Copier):
        def forward(self, model: Any, batch: Any, carry: Any, context: StepContext) -> types.SimpleNamespace:
            runs.append(context.options)
            return super().forward(model, batch, carry, context)

    given = modes(emptied={"memory": False})
    found = measured(Noted(LENGTHS, 80), given).scalars
    assert found["gap/loss_emptied"] == found["gap/loss_window"] == pytest.approx(UNKNOWN)
    assert sum(options == {"memory": False} for options in runs) == 2, "a group each"


def test_without_documents_beyond_the_window_nothing_is_found() -> None:
    evaluation = measured(Copier([[8, 8, 8, 8]] * 2, 16))
    assert evaluation == Evaluation({"gap/labels": 0.0, "gap/documents": 0.0})


class ReadTwice(Copier):
    """Held-out data that is at its end begins anew, as documents of other segments."""

    def __init__(self, lengths: Sequence[Sequence[int]], length: int) -> None:
        super().__init__(lengths, length)
        self.rows = [
            [torch.cat([x, x + len(row) if column == 2 else x]) for column, x in enumerate(parts)]
            for row, parts in zip(lengths, self.rows, strict=True)
        ]
        self.config = replace(self.config, evaluation__steps=2 * self.config.evaluation.steps)


def test_a_document_that_is_read_twice_counts_once() -> None:
    """Its copy would give it its own state for that of another document, and narrow the intervals."""
    lengths = [[3 * WINDOW, 5 * WINDOW], [4 * WINDOW, 4 * WINDOW]]
    once, twice = (measured(kind(lengths, 8 * WINDOW)).scalars for kind in (Copier, ReadTwice))
    assert once == twice and once["gap/documents"] == 4 and once["gap/swap_cost"] > 1


def test_one_document_has_no_other_to_take_a_state_from() -> None:
    found = measured(Copier([[40]], 40)).scalars
    assert "gap/loss_swapped" not in found and found["gap/closed"] == pytest.approx(1)
    assert math.isnan(found["gap/closed_low"])


def test_a_stop_is_heeded_between_any_two_forward_passes() -> None:
    whole = Counting(1000)
    measured(Copier(LENGTHS, 40), sync_point=whole)
    for calls in range(0, 1000 - whole.calls, 7):
        with pytest.raises(Stopped):
            measured(Copier(LENGTHS, 40), sync_point=Counting(calls))


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_groups_hold_every_document_once(count: int, rows: int) -> None:
    documents = [Document(0, index, torch.zeros(9), torch.zeros(9)) for index in range(count)]
    for least in (1, 2):
        groups = grouped(documents, rows, least=least)
        assert [document.segment for group in groups for document in group] == list(range(count))
        sizes = [len(group) for group in groups]
        assert max(sizes) <= rows if least == 1 else min(sizes) >= min(count, max(2, rows))


@pytest.mark.parametrize(("piece", "grain", "steps"), [(8, 8, [8, 8, 8, 8]), (20, 4, [20, 8]), (40, 4, [28])])
def test_rows_are_padded_by_another_document_and_end_with_their_own(piece: int, grain: int, steps: list[int]) -> None:
    group = [Document(3, 7, torch.arange(size), torch.arange(size)) for size in (26, 11)]
    found = pieces(group, 26, piece, grain, counted=True, device=torch.device("cpu"))
    assert [batch.labels.shape[1] for batch in found] == steps
    ends = [sum(steps[: index + 1]) for index in range(len(steps))]
    assert [batch.rows for batch in found] == [
        1 if end - size >= 11 else 2 for end, size in zip(ends, steps, strict=True)
    ]
    for row, document in enumerate(group):
        batches = [batch for batch in found if batch.rows > row]
        labels, segments, positions = (
            torch.cat([getattr(batch, name)[row] for batch in batches])
            for name in ("labels", "segment_ids", "positions")
        )
        assert torch.equal(labels[: len(document)], document.labels)
        assert (labels[len(document) :] == IGNORED).all() and (segments[len(document) :] == 8).all()
        assert torch.equal(positions[len(document) :], torch.arange(len(labels) - len(document)))
        assert all(batch.streams.tolist() == [3] * batch.rows for batch in found)
    uncounted = pieces(group, 26, piece, grain, counted=False, device=torch.device("cpu"))
    assert all((batch.labels == IGNORED).all() for batch in uncounted)
