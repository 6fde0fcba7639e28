"""Sums over contexts against the same measures of all pairs."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.evaluation.rank import effective_rank
from pipeline.systems.cvfp.evaluation.sums import SMALL, ContextSums


def test_all_measures_are_those_of_the_contexts_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(37, 5, generator=generator, dtype=torch.float64) + 0.5
    contexts[3, 2] = 0.001
    embedded = contexts + 0.3 * torch.randn(37, 5, generator=generator, dtype=torch.float64)
    sums = ContextSums(5, torch.device("cpu"))
    for rows in (slice(0, 10), slice(10, 10), slice(10, 37)):
        sums.add(contexts[rows], embedded[rows])
    sums.reduce(Topology())
    others = ~torch.eye(37, dtype=torch.bool)
    units = contexts / contexts.norm(dim=-1, keepdim=True)
    assert sums.count == 37 and sums.width == 5
    assert sums.norm == pytest.approx(float(contexts.norm(dim=-1).mean()))
    assert sums.sparsity == pytest.approx(float((contexts.abs() < SMALL).double().mean())) and sums.sparsity > 0
    assert sums.distance == pytest.approx(float(torch.cdist(contexts, contexts)[others].square().mean().sqrt()))
    assert sums.distance >= float(torch.cdist(contexts, contexts)[others].mean())
    assert sums.cosine == pytest.approx(float((units @ units.T)[others].mean()))
    assert sums.spread == pytest.approx(float((contexts - contexts.mean(0)).square().sum(-1).mean().sqrt()))
    cosines = torch.nn.functional.cosine_similarity(contexts, embedded)
    assert sums.embedding_cosine == pytest.approx(float(cosines.mean()))
    assert sums.effective_rank() == pytest.approx(effective_rank(torch.linalg.svdvals(contexts)), rel=1e-9)


def test_more_contexts_change_what_was_asked_before() -> None:
    sums = ContextSums(2, torch.device("cpu"))
    sums.add(torch.tensor([[1.0, 0.0]]))
    assert sums.effective_rank() == pytest.approx(1)
    sums.add(torch.tensor([[0.0, 1.0]]))
    assert sums.effective_rank() == pytest.approx(2)


def test_of_nothing_and_of_one_context_there_are_no_distances() -> None:
    sums = ContextSums(2, torch.device("cpu"))
    assert math.isnan(sums.spread) and sums.norm == 0
    sums.add(torch.ones(1, 2))
    assert math.isnan(sums.distance) and math.isnan(sums.cosine) and sums.spread == 0
