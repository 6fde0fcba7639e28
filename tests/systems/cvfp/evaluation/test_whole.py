"""What is measured of all tokens, in one pass over each side of the hold-out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.systems.cvfp.evaluation import whole
from pipeline.systems.cvfp.evaluation.pieces import padded
from pipeline.systems.cvfp.evaluation.probe import Probe, classes_of
from pipeline.systems.cvfp.evaluation.rank import effective_rank
from pipeline.systems.cvfp.evaluation.whole import measure_whole
from tests.systems.cvfp.evaluation.reading import CARRIES, ONE, Recurrence, measures


def one_after_another(model: Recurrence, sequences: list[np.ndarray]) -> list[Tensor]:
    return [model.contexts(*padded([one], model.device))[0] for one in sequences]


def test_all_tokens_are_read_once() -> None:
    suite, model = measures(factor=0.9)
    reading = suite.reading
    found = measure_whole(model, reading, ONE)
    # A call for each three documents.
    assert model.calls == -(-17 // 3) + -(-7 // 3)
    training = [suite.documents.document(index)[:12] for index in range(17)]
    contexts = torch.cat(one_after_another(model, training))
    assert len(contexts) == reading.available(training=True)
    assert found.effective_rank == pytest.approx(effective_rank(torch.linalg.svdvals(contexts)) / 8, rel=1e-9)
    held_out = [suite.documents.document(index)[:12] for index in range(17, 24)]
    assert found.context.count == found.embedding.count == sum(max(0, len(one) - 2) for one in held_out)


def test_the_probes_are_fitted_to_all_training_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of a probe that has all contexts at once; beyond the most tokens, of every k-th row."""
    suite, model = measures(factor=0.9)
    sides = [[suite.documents.document(index)[:12] for index in numbers] for numbers in (range(17), range(17, 24))]
    classes = classes_of(np.concatenate(sides[0]))
    (ids, mask), (other, there) = (padded(side, model.device) for side in sides)
    available = suite.reading.available(training=True)
    for most, every in ((available, 1), (available - 1, 2)):
        monkeypatch.setattr(whole, "MOST", most)
        found = measure_whole(model, suite.reading, ONE)
        for result, features in (
            (found.context, model.contexts),
            (found.embedding, lambda ids, mask: model.embedded(ids)),
        ):
            probe = Probe(8, classes, model.device, every)
            probe.add(features(ids, mask), ids, mask, torch.arange(17))
            readout = probe.fit(ONE.topology)
            readout.score(features(other, there), other, there)
            assert result == readout.result(ONE.topology)


@pytest.mark.parametrize("carry", CARRIES)
def test_a_stream_is_measured_too(carry: str) -> None:
    suite, model = measures(carry)
    found = measure_whole(model, suite.reading, ONE)
    assert 0 < found.effective_rank < 1 and found.context.count > 0
    figures = found.figures()
    assert figures["probe/ratio"] == pytest.approx(figures["probe/context"] / figures["probe/embedding"])
