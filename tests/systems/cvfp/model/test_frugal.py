"""Blocks in training: gradients of PyTorch's own operations, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.systems.cvfp.costs import KEPT_BYTES, KEPT_NUMBERS
from pipeline.systems.cvfp.model.blocks import Blocks

LAYERS, WIDTH = 3, 16


def blocks_of(mix: float, dtype: torch.dtype = torch.float64) -> Blocks:
    torch.manual_seed(0)
    blocks = Blocks(LAYERS, WIDTH, 0.3, mix).to(dtype)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return blocks


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("mix", [1.0, 0.4])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("of_context", "of_token"), [(False, True), (True, True), (True, False), (False, False)])
def test_values_and_gradients_are_those_of_blocks_one_after_the_other(
    mix: float, alone: bool, of_context: bool, of_token: bool
) -> None:
    blocks = blocks_of(mix)
    # A parameter that is not trained has no gradient, beside others that have.
    blocks.in_order()[1].norm_token.weight.requires_grad_(False)
    entering, tokens = normal(2, 5, WIDTH, seed=1).requires_grad_(of_context), normal(2, 5, WIDTH, seed=2)
    tokens.requires_grad_(of_token)
    slopes = normal(2, 2, 5, WIDTH, seed=3)
    context, token = entering, tokens
    for block in blocks.in_order():
        context, token = block(context, token)
    found = blocks(entering, tokens, contexts_alone=alone)
    assert (found[1] is None) == alone
    asked = [tensor for tensor in (entering, tokens, *blocks.parameters()) if tensor.requires_grad]
    both = []
    for streams in (found, (context, None if alone else token)):
        value = sum((slope * s).sum() for slope, s in zip(slopes, streams, strict=True) if s is not None)
        both.append(torch.autograd.grad(value, asked, allow_unused=True))
    for one, other in zip(found, (context, token), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    for one, other in zip(*both, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    assert sum(gradient is not None for gradient in both[1]) > 12


@pytest.mark.parametrize("alone", [True, False])
def test_blocks_keep_what_the_plan_counts(alone: bool) -> None:
    """Not the numbers of PyTorch's own operations, six of each channel and block."""
    rows, length = 4, 32
    blocks, kept = blocks_of(1.0, torch.float32), {}
    entering, tokens = (normal(rows, length, WIDTH, seed=seed, dtype=torch.float32) for seed in (1, 2))
    tokens.requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in blocks.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        blocks(entering, tokens, contexts_alone=alone)
    found, each = sum(size for size, _ in kept.values()), rows * length * WIDTH
    expected = LAYERS * each * (KEPT_NUMBERS * 4 + KEPT_BYTES)
    # The first block's sums are what enters; behind the last one a norm keeps what it reads, and two numbers a token.
    # Contexts alone have no token stream of the last block: a sum and a mask less.
    behind = 4 * each + 8 * rows * length if alone else 2 * (4 * each + 8 * rows * length)
    assert found == expected + behind - (each if alone else 0)
    assert found < 0.65 * 6 * 4 * LAYERS * each
