"""Gap closed: the share of what a window costs that a memory gives back by remembering, not by adapting to the data.

Mean losses of the same labels, those at document positions from the window on, of held-out documents:

    L_window   without memory
    L_full     without memory, with full attention as far as the backbone was trained
    L_memory   the model
    L_emptied  the same weights with nothing in memory from beyond the window
    L_swapped  the same weights with the memory state of another document put in at every border of the window
    L_equal    without memory, with a window longer by as many keys and values as the memory's state has room for

    gap closed            = (min(L_window, L_emptied) - L_memory) / (L_window - L_full)
    worth of remembering  = L_emptied - L_memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.lm.documents import DocumentSums
from pipeline.lm.gap_report import EMPTIED, EQUAL, FULL, MEMORY, SWAPPED, WINDOW, gap_report
from pipeline.lm.held_out import Evaluated, run_as
from pipeline.lm.whole_documents import Document, documents_beyond, group_size, grouped, pieces, rounds
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, CarryEntry, Evaluation, Phase, StepContext


@dataclass(frozen=True)
class GapModes:
    """How a system is run for the losses: `StepContext.options` of each."""

    tokens: int
    """Of the window: that of attention, at whose multiples a memory is emptied."""
    window: Mapping[str, Any]
    memory: Mapping[str, Any]
    emptied: Mapping[str, Any]
    full: Callable[[int], Mapping[str, Any]] | None
    """Of the longest document's tokens; None where the backbone was trained at no more than the window."""
    reach: int
    """Tokens that `full` sees at most."""
    is_state: Callable[[str], bool]
    """Whether an entry of the carry, by its name, is the memory's state: what is swapped."""
    equal: Mapping[str, Any] | None = None
    """Of a window without memory whose keys and values take as much room as the window and the memory's state."""


def measure_gap(
    system: Evaluated, model: nn.Module, phase: Phase, sync_point: SyncPoint, modes: GapModes
) -> Evaluation:
    """The losses in all and by position, gap closed and worth of remembering, with their intervals. Collective.

    Each document has a row of its own from its start. All but the swapped pass take steps of `--sequence-length`
    tokens. The swapped pass takes steps of a window: a rule whose result depends on where its chunks begin is compared
    with its own reading in such steps only where the window is a multiple of its chunk.
    """
    documents = documents_beyond(system, phase, sync_point, modes.tokens)
    if not documents:
        return gap_report({}, modes.tokens, modes.reach, 0)
    measure = _Measure(system, model, sync_point, modes, DocumentSums(1 + int(_bins(len(documents[0]) - 1, modes))))
    measure.chains(documents)
    if len(documents) > 1:
        measure.swapped(documents)
    return gap_report(measure.sums.gather(sync_point.topology), modes.tokens, modes.reach, measure.sums.bins)


def _bins(positions: Any, modes: GapModes) -> Tensor:
    """Bin of document positions: 0 within the window, then one per doubling of it."""
    windows = torch.as_tensor(positions) // modes.tokens
    return torch.where(windows > 0, windows.clamp_min(1).double().log2().floor().long() + 1, 0)


@dataclass
class _Measure:
    system: Evaluated
    model: nn.Module
    sync_point: SyncPoint
    modes: GapModes
    sums: DocumentSums

    def chains(self, documents: list[Document]) -> None:
        """All losses but the swapped one, over the whole documents."""
        modes, length = self.modes, self.system.config.sequence_length
        for batches, sizes in self._batches(documents, length, least=1):
            named = {WINDOW: modes.window, MEMORY: modes.memory, EMPTIED: modes.emptied}
            if modes.equal is not None:
                named[EQUAL] = modes.equal
            if modes.full is not None:
                named[FULL] = modes.full(sizes[0])
            runs: dict[str, list[Tensor]] = {}
            for name, same in run_as(named).items():
                if same not in runs:
                    runs[same] = self._chain(batches, named[same])
                for batch, loss in zip(batches, runs[same], strict=True):
                    self._add(batch, name, loss)

    def swapped(self, documents: list[Document]) -> None:
        """Each document of a group reads, window after window, from the state that the one before it had there."""
        for batches, sizes in self._batches(documents, self.modes.tokens, least=2):
            kept: dict[str, Tensor] = {}
            own: Carry = {}
            swapped: Carry = {}
            for index, batch in enumerate(batches):
                if index == 0:
                    losses, own = self._forward(batch, {}, self.modes.memory)
                    swapped = own
                else:
                    losses, swapped = self._forward(batch, self._with_other_states(swapped, kept), self.modes.memory)
                    if index + 1 < len(batches):
                        _, own = self._forward(batch, own, self.modes.memory)
                self._add(batch, SWAPPED, losses)
                # A document that has ended gives on what it had at its last border.
                border = (index + 1) * self.modes.tokens
                alive = sum(size >= border for size in sizes)
                for name, entry in own.items():
                    if self.modes.is_state(name):
                        kept.setdefault(name, entry.tensor.clone())
                        kept[name].narrow(entry.streams, 0, alive).copy_(entry.tensor.narrow(entry.streams, 0, alive))

    @staticmethod
    def _with_other_states(carry: Carry, states: Mapping[str, Tensor]) -> Carry:
        def state(name: str, entry: CarryEntry) -> Tensor:
            if name not in states:
                return entry.tensor
            return states[name].roll(1, entry.streams).narrow(entry.streams, 0, entry.tensor.shape[entry.streams])

        return {name: CarryEntry(state(name, entry), entry.streams, entry.heads) for name, entry in carry.items()}

    def _batches(
        self, documents: list[Document], piece: int, *, least: int
    ) -> Iterator[tuple[list[TokenBatch], list[int]]]:
        """The steps of this data rank's groups, one after the other, and the tokens of each document, longest first."""
        topology, window = self.sync_point.topology, self.modes.tokens
        device = next(self.model.parameters()).device
        grain = piece if window % topology.sequence else min(window, piece)
        groups = grouped(documents, group_size(self.system.config), least=least)
        for together in rounds(groups, topology.data):
            index = min(topology.data_rank, len(together) - 1)
            longest = max(len(document) for group in together for document in group)
            group = together[index]
            yield (
                pieces(group, longest, piece, grain, counted=index == topology.data_rank, device=device),
                [len(document) for document in group],
            )

    def _chain(self, batches: list[TokenBatch], options: Mapping[str, Any]) -> list[Tensor]:
        carry: Carry = {}
        losses = []
        for batch in batches:
            loss, carry = self._forward(batch, carry, options)
            losses.append(loss)
        return losses

    def _forward(self, batch: TokenBatch, carry: Carry, options: Mapping[str, Any]) -> tuple[Tensor, Carry]:
        # Every rank makes as many passes; a stop waits for one of them.
        self.sync_point("evaluation")
        # Rows whose documents have ended are left out.
        carry = {
            name: CarryEntry(entry.tensor.narrow(entry.streams, 0, batch.rows), entry.streams, entry.heads)
            for name, entry in carry.items()
        }
        context = StepContext(self.sync_point.topology, self.system.config.seed, "evaluation", 1, options)
        output = self.system.forward(self.model, batch, carry, context)
        return output.tokens["losses"], output.carry

    def _add(self, batch: TokenBatch, name: str, losses: Tensor) -> None:
        local = self.sync_point.topology.shard(batch.labels.shape[1])
        counted = batch.labels[:, local] != IGNORED
        values = {name: losses, "labels": counted} if name == MEMORY else {name: losses}
        place = _bins(batch.positions[:, local], self.modes)
        self.sums.add(batch.streams, batch.segment_ids[:, local], place, counted, values)
