"""The cut into segments: what every token finds in the memory, whatever the documents, the packing and the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.systems.miras.segments import PAD, plan_segments, rows_at

Token = tuple[int, int]
"""(document, position in it)."""


@dataclass
class Stream:
    """One row, and a memory that is the list of the tokens written into it."""

    tokens: list[Token]
    state: list[Token] = field(default_factory=list)
    before: list[Token] = field(default_factory=list)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Stream], list[int], int, int, int]:
    """Two streams, one of which may begin within a document, cut into the same steps; length, taps, grain."""
    total = draw(st.integers(1, 40))
    rows = []
    for skip in (0, draw(st.integers(0, 12))):
        tokens: list[Token] = []
        document = 0
        while len(tokens) < total + skip:
            count = draw(st.integers(1, 25))
            tokens += [(document, position) for position in range(count)]
            document += 1
        rows.append(Stream(tokens[skip : total + skip]))
    steps = []
    while sum(steps) < total:
        steps.append(draw(st.integers(1, total - sum(steps))))
    return rows, steps, draw(st.integers(1, 9)), draw(st.integers(2, 5)), draw(st.integers(1, 4))


@given(streams())
def test_every_token_finds_what_its_document_wrote_before_its_segment(
    case: tuple[list[Stream], list[int], int, int, int],
) -> None:
    rows, steps, length, taps, grain = case
    reach = length + taps - 2
    for row in rows:
        row.before = [(-1, 0)] * reach
    done = 0
    for index, step in enumerate(steps):
        now = [row.tokens[done : done + step] for row in rows]
        ids, positions = (torch.tensor([[token[part] for token in row] for row in now]) for part in (0, 1))
        carry = torch.tensor([[token[0] for token in row.before] for row in rows]) if index else None
        plan = plan_segments(ids, positions, carry, length=length, taps=taps, grain=grain)
        for which, row in enumerate(rows):
            check(plan, which, row, now[which], length, grain)
            row.before = [*row.before, *now[which]][-reach:]
        done += step


def check(plan, which: int, row: Stream, now: list[Token], length: int, grain: int) -> None:
    extended = [*row.before, *now]
    first = which * len(extended)
    found = []
    for stage in range(plan.stages):
        places = plan.gather_index.view(plan.segment_ids.shape)[stage, which].tolist()
        tokens = [extended[place - first] if 0 <= place - first < len(extended) else None for place in places]
        assert plan.segment_ids[stage, which].tolist() == [PAD if token is None else token[0] for token in tokens]
        state = row.state if plan.receives_state[stage, which] else []
        written, document, begin = [], None, 0
        for place, token in enumerate(tokens):
            # As a scan does: the state is the first document's, and restarts where the document changes.
            if place == 0 or token is None or token[0] != document:
                written = list(state) if place == 0 else []
                document, begin = (None, place) if token is None else (token[0], place)
                if token is not None and (row.tokens[0][0] != document or row.tokens[0][1] == 0):
                    assert begin % min(grain, length) == 0
            if token is None:
                continue
            inside = bool(plan.in_first_document[stage, which, place])
            assert inside == (bool(plan.receives_state[stage, which]) and begin == 0)
            context = [other for other in tokens[: place + 1] if other is not None and other[0] == document]
            written.append(token)
            found.append((token, state if inside else [], context, list(written)))
        if plan.complete[stage, which]:
            assert tokens[-1] is not None
            row.state = written
        elif not plan.passes_through[stage, which]:
            row.state = []
        if stage == 0:
            replayed = plan.replay_mask[which].tolist()
            assert replayed == [place - first < len(row.before) for place in places]
            for place, token in enumerate(tokens):
                if replayed[place]:
                    assert row.before[int(plan.replay_index[which, place])] == token
            begins = next(place for place in places if 0 <= place - first < len(extended)) - first
            assert plan.history_index[which].tolist() == list(range(begins - plan.history_index.shape[1], begins))
    own = found[len(found) - len(now) :]
    assert [token for token, *_ in own] == now
    for (document, position), state, context, written in own:
        known = [token for token in row.tokens if token[0] == document and token[1] <= position]
        segment = position // length
        assert state == [token for token in known if token[1] // length < segment]
        assert context == [token for token in known if token[1] // length == segment]
        assert written == known


@given(streams())
def test_gathering_and_scattering_gives_the_tokens_back(case: tuple[list[Stream], list[int], int, int, int]) -> None:
    rows, _, length, taps, grain = case
    ids, positions = (torch.tensor([[token[part] for token in row.tokens] for row in rows]) for part in (0, 1))
    plan = plan_segments(ids, positions, None, length=length, taps=taps, grain=grain)
    values = torch.arange(1, ids.numel() + 1).view_as(ids)[..., None].double().requires_grad_()
    stages = plan.gather(torch.cat([values.new_zeros(2, plan.reach, 1), values], dim=1))
    assert torch.equal(stages[..., 0] != 0, plan.segment_ids != PAD)
    assert torch.equal(plan.scatter(list(stages)), values)
    assert torch.equal(plan.scatter(list(stages), last=2), values[:, -2:])
    (gradient,) = torch.autograd.grad(stages.sum(), values)
    assert torch.equal(gradient, torch.ones_like(values))


def test_a_long_document_is_one_stage_per_segment() -> None:
    ids = torch.zeros(1, 40, dtype=torch.int64)
    plan = plan_segments(ids, torch.arange(40)[None], None, length=8, taps=4)
    assert plan.stages == 5 and not plan.mixed[0]
    assert plan.receives_state[:, 0].tolist() == [False, True, True, True, True]


def test_short_documents_share_a_stage() -> None:
    ids = torch.arange(8).repeat_interleave(2)[None]
    plan = plan_segments(ids, torch.arange(2).repeat(8)[None], None, length=8, taps=4)
    assert plan.stages == 2
    apart = plan_segments(ids, torch.arange(2).repeat(8)[None], None, length=8, taps=4, grain=4)
    assert apart.stages == 4


def test_a_carry_of_another_size_is_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"carry_ids has shape \[1, 3\]; expected \[1, 10\]"):
        plan_segments(ids, torch.arange(4)[None], ids[:, :3], length=8, taps=4)


def test_rows_at() -> None:
    x = torch.arange(12).view(2, 6)
    assert rows_at(x, torch.tensor([[5, 0], [1, 1]])).tolist() == [[5, 0], [7, 7]]
