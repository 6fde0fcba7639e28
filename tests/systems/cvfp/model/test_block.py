"""What the blocks leave out because nobody reads it, beside the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.systems.cvfp.model.block import relu_of
from tests.systems.cvfp.small import WIDTH, rows, small


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contexts_alone_and_their_gradients_are_those_beside_token_states() -> None:
    model, (ids, _) = small(), rows([7, 7])
    inputs, slopes = normal(2, 7, WIDTH, seed=1), normal(2, 7, WIDTH, seed=2)
    both, alone = model(ids, inputs), model(ids, inputs, contexts_alone=True)
    assert alone.states is None
    torch.testing.assert_close(alone.contexts, both.contexts, atol=1e-12, rtol=1e-12)
    weights = dict(model.blocks.named_parameters()) | dict(model.norm_embed.named_parameters())
    found, expected = (
        torch.autograd.grad((output.contexts * slopes).sum(), [*weights.values()], allow_unused=True)
        for output in (alone, both)
    )
    for name, one, other in zip(weights, found, expected, strict=True):
        # The last block's norm of the token stream is not reached by contexts.
        assert (one is None) == (other is None) == (name == "2.norm_token.weight" or name == "2.norm_token.bias")
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("of_context", [True, False])
@pytest.mark.parametrize("of_token", [True, False])
def test_the_layer_and_its_gradients_are_those_of_both_streams_as_one(of_context: bool, of_token: bool) -> None:
    context, token = normal(5, 4, seed=1).requires_grad_(of_context), normal(5, 4, seed=2).requires_grad_(of_token)
    weight, bias, slopes = (
        normal(6, 8, seed=3).requires_grad_(),
        normal(6, seed=4).requires_grad_(),
        normal(5, 6, seed=5),
    )
    asked = [tensor for tensor in (context, token, weight, bias) if tensor.requires_grad]
    expected = (torch.cat([context, token], dim=-1) @ weight.T + bias).clamp_min(0)
    found = relu_of(context, token, weight, bias)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad((value * slopes).sum(), asked) for value in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
