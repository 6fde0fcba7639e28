"""The tokens before a part are those of the rank before, and their gradients go back to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.parallel.halo import tokens_before
from pipeline.parallel.topology import Topology
from tests.parallel.test_scan import Ranks, stand_in  # noqa: F401


def convolve(before: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """A causal depthwise convolution of x [batch, tokens, width] after the tokens before it."""
    tokens, taps = torch.cat([before, x], dim=1), kernel.shape[0]
    return sum(tokens[:, tap : tap + x.shape[1]] * kernel[tap] for tap in range(taps))  # type: ignore[return-value]


@pytest.mark.parametrize("sizes", [(5, 5), (3, 4, 9), (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_convolution_over_parts_is_that_of_the_whole(sizes: tuple[int, ...], count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, first, kernel, cotangent = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, sum(sizes), 4), (2, count, 4), (count + 1, 4), (2, sum(sizes), 4))
    )
    leaves = [z.clone().requires_grad_() for z in (x, first)]
    whole = convolve(leaves[1], leaves[0], kernel)
    expected = torch.autograd.grad(whole, leaves, cotangent)
    cuts = torch.tensor([0, *sizes]).cumsum(0).tolist()

    def work(topology: Topology) -> list[Tensor]:
        mine = slice(cuts[topology.rank], cuts[topology.rank + 1])
        own = [z.clone().requires_grad_() for z in (x[:, mine], first)]
        before, last = tokens_before(*own, topology)
        y = convolve(before, own[0], kernel)
        assert not last.requires_grad
        return [y, last, *torch.autograd.grad(y, own, cotangent[:, mine])]

    found = Ranks(len(sizes)).run(work)
    assert torch.equal(torch.cat([rank[0] for rank in found], dim=1), whole)
    torch.testing.assert_close(torch.cat([rank[2] for rank in found], dim=1), expected[0])
    torch.testing.assert_close(found[0][3], expected[1])
    for rank in found:
        assert torch.equal(rank[1], x[:, -count:])
    assert not any(rank[3].any() for rank in found[1:])


def test_one_rank_has_what_it_was_given_before_it() -> None:
    x, first = torch.arange(2.0).view(1, 2, 1), -torch.ones(1, 3, 1)
    before, last = tokens_before(x, first, Topology())
    assert torch.equal(before, first)
    assert last.flatten().tolist() == [-1, 0, 1]


def test_a_part_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[1, 2, 4\]: a part of the sequence needs 3 tokens at least"):
        tokens_before(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), Topology(0, 2, 2, object()))  # type: ignore[arg-type]
