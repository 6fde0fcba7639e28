"""Labels are the next tokens of a document, or of a stream, each once in a pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.data.batch import IGNORED
from pipeline.systems.cvfp.prediction.labels import count_labels, following, labels_of
from tests.systems.cvfp.prediction.naive import batches, rows, small


@pytest.mark.parametrize("held_out", [False, True])
def test_labels_of_documents_are_their_next_tokens(tmp_path: Path, held_out: bool) -> None:
    prediction, _ = small(tmp_path)
    for batch in batches(prediction, held_out=held_out):
        after = following(prediction.data.documents, batch, way="document")
        labels = labels_of(batch, after)
        assert torch.equal(labels, labels_of(batch))
        for row, ids in zip(labels, rows(batch), strict=True):
            assert row[row != IGNORED].tolist() == ids[1:].tolist()
            assert row[max(0, len(ids) - 1) :].eq(IGNORED).all()
        assert count_labels(batch, after) == int((labels != IGNORED).sum())


@pytest.mark.parametrize("held_out", [False, True])
def test_labels_of_a_stream_are_all_of_its_side_but_the_first_token(tmp_path: Path, held_out: bool) -> None:
    prediction, _ = small(tmp_path, carry="stream")
    documents = prediction.data.documents
    border = int(documents.ends[documents.training - 1])
    side = range(border, len(documents.tokens)) if held_out else range(border)
    seen: dict[int, int] = {}
    for batch in batches(prediction, held_out=held_out):
        after = following(documents, batch, way="stream")
        labels = labels_of(batch, after)
        for first, row in zip(batch.first.tolist(), labels.tolist(), strict=True):
            found = {first + place + 1: label for place, label in enumerate(row) if label != IGNORED}
            assert not found.keys() & seen.keys()
            seen |= found
        assert count_labels(batch, after) == int((labels != IGNORED).sum())
    assert seen == {place: int(documents.tokens[place]) for place in side[1:]}
