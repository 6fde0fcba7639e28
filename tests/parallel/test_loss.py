"""A rank's loss is its share of one global mean, and a loss that is not finite spoils every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.parallel import loss as module
from pipeline.parallel.loss import add_counts, reduce_sums, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint

CPU = torch.device("cpu")
ALONE = Topology()


@pytest.fixture
def equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of four whose ranks all hold the same."""
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor, group=None: tensor.mul_(4))


def test_counts_are_added_over_micro_batches() -> None:
    assert add_counts([{"ce": 3, "aux": 1}, {"ce": 4}]) == {"ce": 7, "aux": 1}


def test_counts_are_exact_beyond_single_precision() -> None:
    total = SyncPoint(ALONE)("here", counts=add_counts([{"ce": 2**24}, {"ce": 1}]))
    assert total["ce"] == 2**24 + 1


def test_rows_that_sequence_ranks_share_are_counted_once(equal_ranks: None) -> None:
    for sequence, data in ((1, 4), (2, 2), (4, 1)):
        total = SyncPoint(Topology(world=4, sequence=sequence))("here", counts={"ce": 6, "aux": 1})
        assert total == {"ce": 6 * data, "aux": data}


def test_sums_are_added_over_all_ranks(equal_ranks: None) -> None:
    total = reduce_sums({"b": torch.tensor(1.5), "a": torch.tensor(2)}, Topology(world=4, sequence=2), CPU)
    assert {name: float(value) for name, value in total.items()} == {"a": 8.0, "b": 6.0}


def test_a_loss_in_float16_is_scaled_in_float32() -> None:
    """Times a loss scale of 2 ** 16 no number above 1 is finite in float16."""
    loss = scaled_loss({"ce": torch.tensor(2.0, dtype=torch.float16)}, {"ce": 1}, Topology(world=4))
    assert loss.dtype == torch.float32 and float(loss * 2**16) == 2**19
    spoilt = scaled_loss({"ce": torch.tensor(math.inf, dtype=torch.float16)}, {"ce": 1}, ALONE)
    assert math.isnan(float(spoilt * 2**16))


def test_one_rank_minimises_the_mean() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = scaled_loss({"ce": (x**2).sum()}, {"ce": 4}, ALONE)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(14 / 4)
    assert x.grad.tolist() == pytest.approx([0.5, 1.0, 1.5])


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_the_average_over_ranks_is_the_gradient_of_the_global_mean(labels: list[int], slopes: list[float]) -> None:
    """However the labels are spread over ranks, as DeepSpeed averages their gradients."""
    world = len(labels)
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    total = {"ce": sum(labels)}
    gradients = []
    for rank, (count, slope) in enumerate(zip(labels, slopes, strict=False)):
        loss = scaled_loss({"ce": count * slope * w}, total, Topology(rank=rank, world=world))
        gradients.append(torch.autograd.grad(loss, w)[0])
    mean = sum(count * slope for count, slope in zip(labels, slopes, strict=False)) / sum(labels)
    assert float(sum(gradients)) / world == pytest.approx(mean, abs=1e-12)


def test_each_term_has_its_own_divisor() -> None:
    x = torch.tensor(1.0, requires_grad=True)
    loss = scaled_loss({"ce": 8 * x, "aux": 3 * x}, {"ce": 4, "aux": 2}, ALONE)
    loss.backward()
    assert float(loss.detach()) == float(x.grad) == 3.5


def test_nothing_to_learn_from_is_a_loss_of_zero_and_no_division_by_it() -> None:
    x = torch.tensor(1.0, requires_grad=True)
    loss = scaled_loss({"ce": 0 * x}, {"ce": 0}, ALONE)
    loss.backward()
    assert float(loss.detach()) == float(x.grad) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    loss = scaled_loss({"ce": torch.tensor(3.0, dtype=dtype, requires_grad=True)}, {"ce": 2}, ALONE)
    assert loss.dtype == dtype and float(loss.detach()) == 1.5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_makes_every_gradient_nan(value: float) -> None:
    """x + inf has gradient 1: without more, the update would go on as if nothing had happened."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = scaled_loss({"ce": x.sum() + value, "aux": (x * 2).sum()}, {"ce": 2, "aux": 2}, ALONE)
    loss.backward()
    assert torch.isnan(loss)
    assert torch.isnan(x.grad).all()


def test_infinities_that_cancel_are_not_finite_either() -> None:
    x = torch.tensor(1.0, requires_grad=True)
    scaled_loss({"a": x + math.inf, "b": x - math.inf}, {"a": 1, "b": 1}, ALONE).backward()
    assert torch.isnan(x.grad)


def test_no_loss_is_an_error() -> None:
    with pytest.raises(ValueError, match="no loss term"):
        scaled_loss({}, {}, ALONE)
