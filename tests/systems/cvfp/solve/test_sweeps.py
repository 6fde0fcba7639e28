"""Sweeps over all tokens against the recurrence itself, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import SolveConfig
from pipeline.systems.cvfp.model.blocks import BlocksTransition
from pipeline.systems.cvfp.solve.border import Border
from pipeline.systems.cvfp.solve.sequential import sequential
from pipeline.systems.cvfp.solve.sweeps import jacobi, newton, solver
from pipeline.systems.cvfp.solve.transition import Solver, ends_of, shifted
from tests.systems.cvfp.small import reference, rows, small, starts

WAYS = {"jacobi": jacobi, "newton": newton}
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)


def solved_by(way: str, most: int = 100, tolerance: float = 1e-14, border: Border | None = None) -> Solver:
    return partial(WAYS[way], tolerance=tolerance, most=most, border=border)


@settings(max_examples=8, deadline=None)
@given(lengths=LENGTHS)
def test_sequential_is_the_recurrence(lengths: list[int]) -> None:
    model, (ids, mask), start = small(), rows(lengths), starts(len(lengths))
    found = model(ids, start=start, mask=mask).contexts
    for row, length in enumerate(lengths):
        if length:
            torch.testing.assert_close(
                found[row, :length], reference(model, ids[row, :length], start[row]), atol=1e-12, rtol=0
            )


@pytest.mark.parametrize(("dtype", "most_apart"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_one_application_to_shifted_contexts_reproduces_them(dtype: torch.dtype, most_apart: float) -> None:
    model, (ids, mask), start = small().to(dtype), rows([40, 23]), starts(2).to(dtype)
    contexts = model(ids, start=start, mask=mask).contexts
    again = model(ids, shifted(contexts, start)).contexts
    assert (contexts - again)[mask].abs().max() < most_apart


@settings(max_examples=12, deadline=None)
@given(
    lengths=LENGTHS, sweeps=st.integers(1, 9), way=st.sampled_from(sorted(WAYS)), std=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_after_k_sweeps_the_first_k_tokens_are_exact(
    lengths: list[int], sweeps: int, way: str, std: float, seed: int
) -> None:
    """From any contexts, and where the recurrence is chaotic too."""
    model, (ids, mask), start = small(std=std), rows(lengths, seed), starts(len(lengths), seed=seed)
    initial = torch.randn(*ids.shape, start.shape[1], dtype=torch.float64)
    given_ = initial.clone()
    exact = model(ids, start=start, mask=mask, solve=sequential).contexts
    found = model(ids, start=start, mask=mask, initial=initial, solve=solved_by(way, sweeps)).solved
    assert found.sweeps <= min(sweeps, max(lengths))
    apart = (found.contexts - exact)[:, : found.sweeps][mask[:, : found.sweeps]]
    assert apart.abs().max() < 1e-9, "each token multiplies rounding by its growth, which is below 10"
    assert torch.equal(initial, given_)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_sweeps_end_at_the_tolerance(way: str) -> None:
    model, (ids, mask), start = small(decay=0.3), rows([40, 31]), starts(2)
    exact = model(ids, start=start, mask=mask, solve=sequential).contexts
    loose, tight = (model(ids, start=start, mask=mask, solve=solved_by(way, 40, to)).solved for to in (1e-2, 1e-4))
    assert loose.sweeps < tight.sweeps < 40
    assert loose.residual <= 1e-2 and tight.residual <= 1e-4
    errors = [((found.contexts - exact).norm(dim=-1) / 4)[mask].max() for found in (loose, tight)]
    assert errors[1] < 1e-3 and errors[1] < errors[0] < 0.1
    cut = model(ids, start=start, mask=mask, solve=solved_by(way, 3, 1e-5)).solved
    assert cut.sweeps == 3 and cut.residual > 1e-5
    near = model(ids, start=start, mask=mask, initial=exact + 1e-7, solve=solved_by(way, 40, 1e-5)).solved
    assert near.sweeps == 1


def test_newton_needs_fewer_sweeps_than_jacobi() -> None:
    model, (ids, mask), start = small(), rows([80]), starts(1)
    taken = {way: model(ids, start=start, mask=mask, solve=solved_by(way, 80, 1e-4)).solved.sweeps for way in WAYS}
    assert taken["newton"] < 0.7 * taken["jacobi"] < 0.7 * 80


@pytest.mark.parametrize("layers", [1, 3])
def test_the_diagonal_is_near_that_of_the_jacobian(layers: int) -> None:
    """What is left out is of the order of a weight, or of 1 / D."""
    model = small(layers=layers, decay=0.7, std=0.02, width=64)
    transition, token = BlocksTransition(model.blocks, 1), starts(1, 64, seed=5)[0]
    context = starts(1, 64, seed=6)[0]
    exact = torch.func.jacrev(lambda entering: transition(entering, token))(context).diagonal()
    new, estimate = transition.with_diagonal(context, token)
    torch.testing.assert_close(new, transition(context, token))
    assert (estimate - exact).norm() < 0.1 * exact.norm()
    assert exact.norm() > 1


def test_a_run_chooses_the_way() -> None:
    (ids, mask), start = rows([30]), starts(1)
    ways = [SolveConfig("sequential"), SolveConfig("jacobi", 1e-8), SolveConfig("newton", 1e-8)]
    found = [small(solve=way)(ids, start=start, mask=mask).solved for way in ways]
    assert found[0].sweeps == 1 < found[2].sweeps
    assert solver(ways[0]) is sequential
    for other in found[1:]:
        torch.testing.assert_close(other.contexts, found[0].contexts, atol=1e-6, rtol=0)


def whole(model: object, ids: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """The contexts [tokens, D] of the rows' tokens as one row."""
    flat = ids[mask][None]
    return model(flat, start=start, solve=sequential).contexts[0]  # type: ignore[operator]


@pytest.mark.parametrize("way", sorted(WAYS))
def test_rows_of_a_stream_are_solved_as_one(way: str) -> None:
    model, (ids, mask), start = small(decay=0.3), rows([17, 0, 5, 30]), starts(1)
    border = Border(Topology(), first=start[0])
    by = solved_by(way, 200, 1e-13, border=border)
    found = model(ids, start=torch.zeros(4, 16).double(), mask=mask, solve=by).solved
    torch.testing.assert_close(found.contexts[mask], whole(model, ids, mask, start), atol=1e-10, rtol=0)


def test_a_ring_is_an_orbit() -> None:
    model, (ids, mask) = small(decay=0.3), rows([17, 9])
    by = solved_by("jacobi", 300, 1e-13, border=Border(Topology(), circular=True))
    found = model(ids, start=torch.zeros(2, 16).double(), mask=mask, solve=by).solved
    end = ends_of(found.contexts, mask.sum(1), found.contexts[:, 0])[-1:]
    torch.testing.assert_close(found.contexts[mask], whole(model, ids, mask, end), atol=1e-10, rtol=0)


def test_contexts_that_are_not_numbers_are_not_at_rest() -> None:
    model, (ids, mask), start = small(), rows([12]), starts(1)
    found = model(ids, start=start * torch.nan, mask=mask, solve=solved_by("jacobi", 4)).solved
    assert found.sweeps == 4 and found.residual == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_sweeps_end_at_its_rounding(dtype: torch.dtype) -> None:
    model, (ids, mask), start = small(decay=0.3).to(dtype), rows([40]), starts(1)
    exact = model(ids, start=start, mask=mask, solve=sequential).contexts
    for way in WAYS:
        found = model(ids, start=start, mask=mask, solve=solved_by(way, 100, 1e-9)).solved
        assert found.sweeps < 40 and found.contexts.dtype == dtype
        assert (found.contexts - exact).float().norm(dim=-1).max() < 100 * torch.finfo(dtype).eps
