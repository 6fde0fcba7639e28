"""Growth of differences along a row."""

from __future__ import annotations

import math

import torch

from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.solve.sequential import sequential, sequential_with_growth
from pipeline.systems.cvfp.solve.transition import shifted
from tests.systems.cvfp.small import WIDTH, rows, small, starts


class Linear:
    """c_t = A c_{t-1} + e_t, whose growth is known."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def __call__(self, contexts: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        return contexts @ self.matrix.T + embedded

    def with_diagonal(self, contexts: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(contexts, embedded), self.matrix.diagonal().expand_as(contexts)


def test_growth_is_the_largest_factor_of_a_linear_recurrence() -> None:
    transition = Linear(torch.diag(torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)))
    embedded, start = torch.ones(2, 60, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.arange(60) < torch.tensor([60, 40])[:, None]
    found = sequential_with_growth(transition, embedded, start, mask)
    assert found.growth is not None
    assert (found.growth - math.log(0.9)).abs().max() < 0.05
    torch.testing.assert_close(found.contexts[mask], sequential(transition, embedded, start, mask).contexts[mask])


def test_a_context_that_is_forgotten_at_once_has_a_finite_growth() -> None:
    transition = Linear(torch.zeros(3, 3, dtype=torch.float64))
    ones = torch.ones(1, 4, 3, dtype=torch.float64)
    found = sequential_with_growth(transition, ones, ones[:, 0], torch.ones(1, 4, dtype=torch.bool))
    assert found.growth is not None and -800 < float(found.growth) < -600


def test_growth_is_that_of_a_small_difference() -> None:
    """The whole row's factor, by the product of its Jacobians."""
    model, (ids, mask), start = small(decay=0.3), rows([25]), starts(1)
    reader = Reader(model, WIDTH, exact=True)
    growth = float(reader.growth(ids, mask, start))
    contexts = shifted(model(ids, start=start).contexts, start)[0]
    model.requires_grad_(False)
    product, logs = torch.eye(WIDTH, dtype=torch.float64), 0.0
    for position, context in enumerate(contexts):
        one = ids[:, position : position + 1]
        jacobian = torch.func.jacrev(lambda entering, one=one: model(one, entering[None, None]).contexts[0, 0])(context)
        product = jacobian @ product
        logs += float(product.norm().log())
        product = product / product.norm()
    assert abs(growth - logs / 25) < 0.15
    chaotic = Reader(small(decay=1.0, std=1.0), WIDTH).growth(ids, mask, start)
    assert growth < 0 < float(chaotic)
