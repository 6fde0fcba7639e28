"""What each memory is worth: held-out loss with it empty, or with the contents of another stream in its place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, StatefulLoader, TokenBatch
from pipeline.parallel.loss import reduce_sums
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Evaluation
from pipeline.systems.neuromorphic.facts import FactsBatch
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState, StreamState, Uses
from pipeline.systems.neuromorphic.statistics import HeldOutShares, right_answers

NOTHING = "nothing"
"""What the model as it is lacks."""
MEMORIES = {"WM": "working", "PM": "procedural", "EM": "episodic"}
"""From the reference's names to the fields of `Uses` and `StreamState`."""
BOTH, ALL, OWN = "PM and EM", "all", "own "


@dataclass(frozen=True)
class Ablation:
    """One way in which the held-out text is read."""

    name: str
    empty: tuple[str, ...] = ()
    """Memories that are read as if nothing had been written, and not written."""
    swapped: tuple[str, ...] = ()
    """Memories that a span reads as another stream of the micro-batch has them; written are the stream's own."""

    def uses(self, uses: Uses) -> Uses:
        changes: dict[str, Any] = dict.fromkeys(self.empty, "empty")
        return dataclasses.replace(uses, **changes)


def ablations_of(uses: Uses) -> tuple[Ablation, ...]:
    """Those of a phase: the model as it is, each memory empty, all of them, and each one's contents swapped."""
    there = {name: memory for name, memory in MEMORIES.items() if getattr(uses, memory) != "absent"}
    plastic = {name: memory for name, memory in there.items() if name != "WM"}
    found = [Ablation(NOTHING), *(Ablation(name, (memory,)) for name, memory in there.items())]
    if len(plastic) > 1:
        found.append(Ablation(BOTH, tuple(plastic.values())))
    found.append(Ablation(ALL, tuple(there.values())))
    found += [Ablation(f"{OWN}{name}", swapped=(memory,)) for name, memory in plastic.items()]
    return tuple(found)


Text = TypeVar("Text", bound=TokenBatch)
Memory = TypeVar("Memory", ProceduralState, EpisodicState)


def of_another(memory: Memory) -> Memory:
    """Of each row, that of the row before it."""
    return dataclasses.replace(
        memory, **{field.name: getattr(memory, field.name).roll(1, 0) for field in dataclasses.fields(memory)}
    )


class Reading:
    """Streams that are read in all the ways at once, a span at a time."""

    def __init__(self, model: nn.Module, span: int, uses: Uses, ways: Sequence[Ablation]) -> None:
        self.model, self.span, self.ways = model, span, ways
        self.uses = {way.name: way.uses(uses) for way in ways}
        self.states: dict[str, StreamState | None] = dict.fromkeys(self.uses)
        """After the spans that were read; None before the first."""

    @torch.no_grad()
    def read(self, batch: TokenBatch, *, predict: bool = False) -> dict[str, Any]:
        """The outputs of a micro-batch by the way's name: losses [N, T], and predictions [N, T] if wanted."""
        losses: dict[str, list[Tensor]] = {way.name: [] for way in self.ways}
        predictions: dict[str, list[Tensor]] = {way.name: [] for way in self.ways}
        for start in range(0, batch.input_ids.shape[1], self.span):
            place = slice(start, start + self.span)
            pieces = [x[:, place] for x in (batch.input_ids, batch.labels, batch.segment_ids, batch.positions)]
            before = self.states[NOTHING]
            for way in self.ways:
                state = self._own(way, before)
                found = self.model(*pieces, state, self.uses[way.name], predict=predict)
                self.states[way.name] = found.state
                losses[way.name].append(found.losses)
                if predict:
                    predictions[way.name].append(found.predictions)
        joined = {"losses": losses, "predictions": predictions} if predict else {"losses": losses}
        return {kind: {name: torch.cat(parts, 1) for name, parts in by.items()} for kind, by in joined.items()}

    def _own(self, way: Ablation, as_is: StreamState | None) -> StreamState | None:
        """The state that a way begins a span with. What the model as it is has written is swapped: what is written
        in a span that read another's memory is of no stream."""
        state = self.states[way.name]
        if state is None or as_is is None or not way.swapped:
            return state
        return dataclasses.replace(state, **{memory: of_another(getattr(as_is, memory)) for memory in way.swapped})


def ablate(
    model: nn.Module, loader: StatefulLoader[Text], steps: int, span: int, uses: Uses, sync_point: SyncPoint
) -> dict[str, Evaluation]:
    """The held-out loss, and right answers of the facts task, of the next `steps` steps of the loader, by what is left
    out, from streams that have read nothing; the streams of training are not touched. Of micro-batches of one row
    nothing is swapped. Collective; the model is to be in evaluation mode."""
    device = next(model.parameters()).device
    readings: dict[int, Reading] = {}
    sums: dict[str, Tensor] = {}
    answers: dict[str, HeldOutShares] = {}
    ways = ablations_of(uses)
    for _ in range(steps):
        for micro, batch in enumerate(next_step(loader, sync_point, "ablation")):
            sync_point("ablation")
            if micro not in readings:
                kept = tuple(way for way in ways if batch.rows > 1 or not way.swapped)
                readings[micro] = Reading(model, span, uses, kept)
            there = batch.to(device)
            counted = there.labels != IGNORED
            sums["labels"] = sums.get("labels", 0) + counted.sum().double()
            found = readings[micro].read(there, predict=isinstance(there, FactsBatch))
            if isinstance(there, FactsBatch):
                for name, predictions in found["predictions"].items():
                    answers.setdefault(name, HeldOutShares()).add(right_answers(there, predictions))
            for name, losses in found["losses"].items():
                nats = losses.double().masked_fill(~counted, 0).sum()
                sums[name] = sums.get(name, 0) + nats
    totals = {name: float(value) for name, value in reduce_sums(sums, sync_point.topology, device).items()}
    labels = max(1.0, totals.pop("labels"))
    means = {name: value / labels for name, value in totals.items()}
    right = {name: shares.means(sync_point.topology) for name, shares in answers.items()}
    return {
        way.name: Evaluation({"loss": means[way.name], "ppl": perplexity(means[way.name]), **right.get(way.name, {})})
        for way in ways
        if way.name in means
    }


def perplexity(loss: float) -> float:
    """exp(loss), inf where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def ablation_summary(ablations: Mapping[str, Evaluation]) -> dict[str, float]:
    """The reference's summary: perplexity of the model as it is and with procedural and episodic memory empty, and the
    difference; and for every way, the nats per token that it costs."""
    as_is = ablations[NOTHING].scalars
    off = ablations.get(BOTH, ablations["PM"]).scalars
    summary = {
        "ablate_ppl_normal": as_is["ppl"],
        "ablate_ppl_plasticity_off": off["ppl"],
        "ablate_gap": off["ppl"] - as_is["ppl"],
    }
    for name, found in ablations.items():
        if name != NOTHING:
            summary[cost_of(name)] = found.scalars["loss"] - as_is["loss"]
    return summary


def cost_of(name: str) -> str:
    """The key of what an ablation costs, in nats per token: ablate_cost_pm, ablate_cost_pm_swapped, ..."""
    name = f"{name.removeprefix(OWN)}_swapped" if name.startswith(OWN) else name
    return f"ablate_cost_{name.lower().replace(' ', '_')}"
