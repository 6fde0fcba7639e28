"""What enters the tokens of a pass is what the recurrence leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.prediction.exact import exact_inputs
from tests.systems.cvfp.prediction.naive import SYNC, rows, small, states_and_contexts


def test_of_documents_they_are_those_of_the_recurrence_from_zero(tmp_path: Path) -> None:
    prediction, model = small(tmp_path)
    loader, reader = prediction.data.training(SYNC.topology), Reader(model, prediction.sizes.width)
    seen = 0
    for batch, inputs in exact_inputs(reader, loader, prediction.sizes, SYNC, "test"):
        for found, ids in zip(inputs, rows(batch), strict=True):
            if len(ids):
                _, contexts = states_and_contexts(model, ids)
                expected = torch.cat([torch.zeros_like(contexts[:1]), contexts[:-1]])
                torch.testing.assert_close(found[: len(ids)].double(), expected, rtol=1e-6, atol=1e-6)
                seen += 1
    assert seen == prediction.data.documents.training


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("way", ["sequential", "jacobi"])
@pytest.mark.parametrize("carry", ["stream", "circular"])
def test_of_a_stream_they_are_those_of_its_tokens_one_after_the_other(
    tmp_path: Path, carry: str, way: str, held_out: bool
) -> None:
    """Of parts, and of rows that follow each other."""
    prediction, model = small(tmp_path, carry=carry, way=way)
    with torch.no_grad():
        # So that the circle forgets where it began.
        for block in model.blocks:
            block.linear.weight *= 0.3
    documents = prediction.data.documents
    border = int(documents.ends[documents.training - 1])
    side = slice(border, None) if held_out else slice(border)
    whole = torch.from_numpy(documents.tokens[side].astype("int64"))
    laps = 12 if carry == "circular" else 1
    _, contexts = states_and_contexts(model, whole.repeat(laps))
    lap = contexts[-len(whole) :]
    before = lap[-1:] if carry == "circular" else torch.zeros_like(lap[:1])
    expected = torch.cat([before, lap[:-1]])
    offset = side.start or 0
    loader, reader = prediction.data.open(SYNC.topology, held_out), Reader(model, prediction.sizes.width, exact=True)
    seen: list[int] = []
    for batch, inputs in exact_inputs(reader, loader, prediction.sizes, SYNC, "test"):
        for found, first, length in zip(inputs, batch.first.tolist(), batch.lengths.tolist(), strict=True):
            places = list(range(first - offset, first - offset + length))
            seen += places
            apart = (found[:length].double() - expected[places]).norm(dim=-1) / expected[places].norm(dim=-1).clamp_min(
                1
            )
            assert apart.max() < 3e-4
    # Every token once: the readings that look for the rows' starts are not among them.
    assert sorted(seen) == list(range(len(whole)))


def test_where_nothing_is_forgotten_a_stream_is_read_until_it_is_exact(tmp_path: Path) -> None:
    """A difference at a start grows along the row: as many readings as rows, and then every token is right."""
    for way in ("sequential", "jacobi"):
        prediction, model = small(tmp_path, carry="stream", way=way)
        with torch.no_grad():
            for block in model.blocks:
                block.linear.weight *= 4
        documents = prediction.data.documents
        whole = torch.from_numpy(documents.tokens[: documents.ends[documents.training - 1]].astype("int64"))
        _, contexts = states_and_contexts(model, whole)
        expected = torch.cat([torch.zeros_like(contexts[:1]), contexts[:-1]])
        loader, reader = prediction.data.training(SYNC.topology), Reader(model, prediction.sizes.width, exact=True)
        for batch, inputs in exact_inputs(reader, loader, prediction.sizes, SYNC, "test"):
            for found, first, length in zip(inputs, batch.first.tolist(), batch.lengths.tolist(), strict=True):
                torch.testing.assert_close(
                    found[:length].double(), expected[first : first + length], rtol=1e-3, atol=1e-3
                )
