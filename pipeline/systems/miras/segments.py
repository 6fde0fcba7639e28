"""Segments of documents: where the rows of a step are cut so that a memory can be read as it was before a segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

PAD = -2
"""The segment id of a place without a token; -1 is that of a token before the stream."""


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """The rows of one step, cut into stages of at most `length` tokens; shared by all layers.

    A segment is `length` tokens of a document, counted from the document's start, so that a document is cut alike
    wherever it lies in a row and however it is split over steps. A stage of a row is one segment, or several that
    belong to different documents, when they are short. Stage i of all rows is computed together: the state that one
    stage leaves is the state that the next one finds.

    A segment that an earlier step began is done again from its start: its first tokens come from the carry, the last
    `reach` tokens before this step. The *extended* row is those and this step's own tokens.
    """

    reach: int
    gather_index: Tensor
    """[stages * batch * length] int64 into extended rows laid end to end; past their end where there is no token."""
    scatter_index: Tensor
    """[batch, tokens] int64 into the stages' places laid end to end: where each of this step's tokens is."""
    history_index: Tensor
    """[batch, taps - 1] int64 into the carry's tokens: those before the first stage."""
    segment_ids: Tensor
    """[stages, batch, length] int64, PAD where there is no token."""
    replay_mask: Tensor
    """[batch, length] bool: the tokens of the first stage that come from the carry."""
    replay_index: Tensor
    """[batch, length] int64 into the carry's tokens: where those are."""
    receives_state: Tensor
    """[stages, batch] bool: the first document of the stage finds the state; else the stage starts from none."""
    in_first_document: Tensor
    """[stages, batch, length] bool: the tokens of that first document."""
    complete: Tensor
    """[stages, batch] bool: the stage ends at a segment's end, and its state is passed on."""
    passes_through: Tensor
    """[stages, batch] bool: it ends within the segment that it found, or has no token: the state from before it is."""
    mixed: tuple[bool, ...]
    """Per stage: in some row the first document finds a state, and another one begins behind it."""

    @property
    def stages(self) -> int:
        return self.segment_ids.shape[0]

    def gather(self, extended: Tensor) -> Tensor:
        """extended [batch, reach + tokens, ...] as [stages, batch, length, ...], zeros where there is no token."""
        flat = extended.flatten(0, 1)
        flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return flat.index_select(0, self.gather_index).unflatten(0, self.segment_ids.shape)

    def scatter(self, stages: Sequence[Tensor], last: int | None = None) -> Tensor:
        """A tensor [batch, length, ...] per stage as [batch, tokens, ...]: this step's own tokens, or the last ones."""
        index = self.scatter_index if last is None else self.scatter_index[:, -last:]
        rows = rearrange(list(stages), "stages batch length ... -> (stages batch length) ...")
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, tokens, ...] at index [batch, count] as [batch, count, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


@dataclass
class _Cuts:
    """The stages of one row: pieces (where in the stage, first and last token of the extended row), and the flags of
    `SegmentPlan`."""

    pieces: list[list[tuple[int, int, int]]] = field(default_factory=list)
    receives_state: list[bool] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)
    passes_through: list[bool] = field(default_factory=list)
    mixed: list[bool] = field(default_factory=list)


def plan_segments(
    segment_ids: Tensor, positions: Tensor, carry_ids: Tensor | None, *, length: int, taps: int, grain: int = 1
) -> SegmentPlan:
    """Cuts the rows of one step. Waits for the device once: the number of stages is needed on the host.

    Args:
        segment_ids: [batch, tokens] int64 >= 0, one id per document of a stream, the same in the next step.
        positions: [batch, tokens] int64, positions within the document; they go on across steps.
        carry_ids: [batch, length + taps - 2] ids of the tokens before this step, -1 where there is none; None at the
            start of the streams.
        length: tokens of a segment.
        taps: width of a causal convolution that runs over the tokens.
        grain: every document in a stage begins at a multiple of this many places: the tokens of a chunk, for a scan
            whose result depends on where its chunks begin.
    """
    batch, tokens = segment_ids.shape
    reach = length + taps - 2
    if carry_ids is None:
        carry_ids = segment_ids.new_full((batch, reach), -1)
    if carry_ids.shape != (batch, reach):
        raise ValueError(f"carry_ids has shape {list(carry_ids.shape)}; expected {[batch, reach]}")
    device = segment_ids.device
    ids, places = torch.cat([carry_ids, segment_ids, positions], dim=1).cpu().split([reach + tokens, tokens], dim=1)

    rows = [_cut(ids[row], places[row], reach, length, min(grain, length)) for row in range(batch)]
    stages = max(len(row.pieces) for row in rows)
    extended = reach + tokens
    gather_index = torch.full((stages, batch, length), batch * extended)
    for index, row in enumerate(rows):
        for stage, pieces in enumerate(row.pieces):
            for first, start, end in pieces:
                gather_index[stage, index, first : first + end - start] = torch.arange(start, end) + index * extended
    present = gather_index < batch * extended
    stage_ids = torch.where(present, ids.flatten()[gather_index.clamp(max=batch * extended - 1)], PAD)

    row_index = torch.arange(batch)[:, None]
    within = gather_index - row_index * extended
    own = present & (within >= reach)
    scatter_index = torch.empty(batch * tokens, dtype=torch.int64)
    scatter_index[(within - reach + row_index * tokens)[own]] = own.flatten().nonzero().squeeze(1)
    begins = torch.tensor([[row.pieces[0][0][1]] for row in rows])
    replay_mask = present[0] & (within[0] < reach)

    def flags(name: str, rest: bool) -> Tensor:
        """[stages, batch]; `rest` for the stages that a row does not have."""
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([values + [rest] * (stages - len(values)) for values in lists]).T.contiguous()

    receives_state = flags("receives_state", False)
    return SegmentPlan(
        reach,
        gather_index.flatten().to(device),
        scatter_index.unflatten(0, (batch, tokens)).to(device),
        (begins + torch.arange(1 - taps, 0)).to(device),
        stage_ids.to(device),
        replay_mask.to(device),
        torch.where(replay_mask, within[0], 0).to(device),
        receives_state.to(device),
        (receives_state[..., None] & (stage_ids == stage_ids[..., :1])).to(device),
        flags("complete", False).to(device),
        flags("passes_through", True).to(device),
        tuple(flags("mixed", False).any(dim=1).tolist()),
    )


def _cut(ids: Tensor, positions: Tensor, reach: int, length: int, grain: int) -> _Cuts:
    """ids [reach + tokens] of an extended row, positions [tokens] of its own tokens."""
    replayed = 0
    if bool(ids[reach - 1] == ids[reach]):
        # There are fewer tokens than the position says when the stream began within the document.
        known = int((ids[reach - (length - 1) : reach] == ids[reach]).sum())
        replayed = min(int(positions[0]) % length, known)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = ids[reach + 1 :] != ids[reach:-1]
    new = {index + reach for index in begins.nonzero().squeeze(1).tolist()}
    bounds = (begins | (positions % length == 0)).nonzero().squeeze(1) + reach
    ends = [*(bound for bound in bounds.tolist() if bound > reach), ids.shape[0]]

    cuts = _Cuts()
    start = reach - replayed
    # The place of the first token in its segment: not 0 only where the stream began within a document.
    place = (int(positions[0]) - replayed) % length
    found = place == 0 and bool(ids[reach - 1] == ids[reach])
    upcoming = 0
    while start < ids.shape[0]:
        pieces = []
        while True:
            end = ends[upcoming]
            upcoming += 1
            pieces.append((place, start, end))
            place = -(-(place + end - start) // grain) * grain
            if end not in new or place + ends[upcoming] - end > length:
                break
            start = end
        complete = bool((positions[end - 1 - reach] + 1) % length == 0)
        cuts.pieces.append(pieces)
        cuts.receives_state.append(found)
        cuts.complete.append(complete)
        cuts.passes_through.append(found and len(pieces) == 1 and not complete)
        cuts.mixed.append(found and len(pieces) > 1)
        start, place, found = end, 0, end not in new
    return cuts
