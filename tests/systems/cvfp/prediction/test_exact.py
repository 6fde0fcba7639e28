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
def test_of_a_stream_its_first_two_parts_are_exact(tmp_path: Path, held_out: bool) -> None:
    prediction, model = small(tmp_path, carry="stream")
    documents, parts = prediction.data.documents, prediction.config.batch_size
    border = int(documents.ends[documents.training - 1])
    side = slice(border, None) if held_out else slice(border)
    whole = torch.from_numpy(documents.tokens[side].astype("int64"))
    _, contexts = states_and_contexts(model, whole)
    expected = torch.cat([torch.zeros_like(contexts[:1]), contexts[:-1]])
    offset, end_of_second = side.start or 0, len(whole) * 2 // parts
    loader, reader = prediction.data.open(SYNC.topology, held_out), Reader(model, prediction.sizes.width)
    seen: list[int] = []
    for batch, inputs in exact_inputs(reader, loader, prediction.sizes, SYNC, "test"):
        for found, first, length in zip(inputs, batch.first.tolist(), batch.lengths.tolist(), strict=True):
            places = range(first - offset, first - offset + length)
            seen += places
            if length and places[-1] < end_of_second:
                torch.testing.assert_close(found[:length].double(), expected[list(places)], rtol=1e-6, atol=1e-6)
    # Every token once: the pass that looks for the parts' starts is not one of them.
    assert sorted(seen) == list(range(len(whole)))
