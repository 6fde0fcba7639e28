"""What is measured of all tokens, in one pass over each side of the hold-out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.systems.cvfp.evaluation.pieces import padded
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


def test_the_probes_are_fitted_to_all_training_tokens() -> None:
    """Answers are those of ridge regression of all contexts at once."""
    suite, model = measures(factor=0.9)
    found = measure_whole(model, suite.reading, ONE)
    sides = [[suite.documents.document(index)[:12] for index in numbers] for numbers in (range(17), range(17, 24))]
    counts = np.bincount(np.concatenate(sides[0]))
    classes = np.argsort(-counts, kind="stable")[: (counts > 0).sum()]
    for result, features in (
        (found.context, one_after_another),
        (found.embedding, lambda model, texts: [model.embedded(torch.from_numpy(one.astype("i8"))) for one in texts]),
    ):
        (x, labels), (other, wanted) = (
            (
                np.concatenate([one[2:].numpy() for one in features(model, texts)]),
                np.concatenate([one[:-2] for one in texts]),
            )
            for texts in sides
        )
        y = (labels[:, None] == classes).astype(float)
        centred = x - x.mean(0)
        covariance = centred.T @ centred / len(x)
        penalty = result.ridge * np.trace(covariance) / 8 * np.eye(8)
        weights = np.linalg.solve(covariance + penalty, centred.T @ (y - y.mean(0)) / len(x))
        answers = classes[((other - x.mean(0)) @ weights + y.mean(0)).argmax(-1)]
        assert result.accuracy == pytest.approx(float((answers == wanted).mean()), abs=1e-12)
        assert result.most_frequent == pytest.approx(float((wanted == classes[0]).mean()), abs=1e-12)


@pytest.mark.parametrize("carry", CARRIES)
def test_a_stream_is_measured_too(carry: str) -> None:
    suite, model = measures(carry)
    found = measure_whole(model, suite.reading, ONE)
    assert 0 < found.effective_rank < 1 and found.context.count > 0
    figures = found.figures()
    assert figures["probe/ratio"] == pytest.approx(figures["probe/context"] / figures["probe/embedding"])
