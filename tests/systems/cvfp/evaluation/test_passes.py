"""The guide's check of convergence, and the difference by position, against loops over tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.systems.cvfp.evaluation.passes import by_position, pass_differences
from pipeline.systems.cvfp.evaluation.pieces import padded
from tests.systems.cvfp.evaluation.reading import ONE, Recurrence, documents


def prototype_differences(model: Recurrence, tokens: np.ndarray) -> list[float]:
    """Token after token, as the prototype does it: each pass from where the one before ended."""
    context, passes = torch.zeros(model.width, dtype=torch.float64), []
    for _ in range(5):
        found = []
        for token in tokens[:100].tolist():
            context = model.applied(context[None, None], torch.tensor([[token]]))[0, 0]
            found.append(context)
        passes.append(torch.stack(found))
    return [float((one - before).norm(dim=-1).mean()) for before, one in pairwise(passes)]


@pytest.mark.parametrize("factor", [0.5, 0.999, 2.0])
def test_the_differences_are_those_of_the_prototype(factor: float) -> None:
    model, tokens = Recurrence(factor=factor), documents([70, 80], 1).tokens
    found = pass_differences(model, tokens, ONE)
    assert len(found.differences) == 4 and found.final == found.differences[-1]
    assert found.differences == pytest.approx(prototype_differences(model, tokens), rel=1e-9, abs=1e-15)
    assert found.relative == found.final / found.norm


def test_a_contraction_forgets_its_start_and_a_rotation_does_not() -> None:
    tokens = documents([40, 1], 1).tokens
    # The second pass begins elsewhere, the later ones where the one before it began, to rounding.
    first, *_, last = pass_differences(Recurrence(factor=0.5), tokens, ONE).differences
    assert first > 1e-2 and last < 1e-9
    assert pass_differences(Recurrence(factor=4.0), tokens, ONE).final > 1e-2


def test_the_difference_by_position_is_that_of_two_starts() -> None:
    model, data = Recurrence(), documents([6, 4, 5], 1)
    ids, mask = padded([data.document(index) for index in range(3)], model.device)
    found = by_position(model, ids, mask, ONE)
    zero = [model.contexts(ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
            for row, length in enumerate((6, 4, 5))]  # fmt: skip
    for place in range(6):
        squares, norms = [], []
        for row, length in enumerate((6, 4, 5)):
            if place < length:
                other = model.contexts(ids[row : row + 1, :length], mask[row : row + 1, :length], zero[row - 1][-1:])[0]
                squares.append(float((zero[row] - other)[place].square().mean()))
                norms.append(float(zero[row][place].norm()))
        assert float(found.squares[place]) == pytest.approx(np.mean(squares))
        assert float(found.norms[place]) == pytest.approx(np.mean(norms))
    # It falls by the square of the factor a token, or faster, where tanh is flatter than 1.
    assert float(found.squares[3]) < 0.25**3 * float(found.squares[0]) and not math.isnan(float(found.squares[5]))
