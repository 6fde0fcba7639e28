from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.model.decoder import SpatialDecoder
from tests.systems.neuromorphic.small import SIZES
from tests.systems.neuromorphic.test_columns import filled

N, P = 2, 3
S = SIZES.sizes


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((S.layers, S.columns, N, P, S.column_width), (N, P, S.column_width), (N, P, S.episodic_width))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (*shapes, (N, P, S.width)))


def test_every_token_is_decoded_from_itself_alone_and_from_all_that_is_said_of_it() -> None:
    for published in (False, True):
        decoder = filled(SpatialDecoder(dataclasses.replace(SIZES, as_published=published)))
        given = inputs()
        out = decoder(*given)
        found = torch.autograd.grad(out[1, 2].square().sum(), given)
        of_token = found[0][:, :, 1, 2], *(x[1, 2] for x in found[1:])
        assert all(bool((x.abs() > 1e-9).any()) for x in of_token)
        for x, whole in zip(of_token, found, strict=True):
            assert int((whole != 0).sum()) == int((x != 0).sum())


def test_a_memory_that_is_absent_is_no_token() -> None:
    decoder, (layers, procedural, episodic, working) = filled(SpatialDecoder(SIZES)), inputs()
    out = decoder(layers, procedural, None, working)
    assert not torch.allclose(out, decoder(layers, procedural, torch.zeros_like(episodic), working))
    gradients = torch.autograd.grad(out.sum(), list(decoder.from_episodic.parameters()), allow_unused=True)
    assert gradients == (None, None)


def test_as_published_the_attention_of_one_query_to_itself_is_its_value() -> None:
    decoder = filled(SpatialDecoder(dataclasses.replace(SIZES, as_published=True)))
    alone = decoder.blocks[0].alone
    query = torch.randn(1, N, P, 1, S.decoder_width, dtype=torch.float64)
    torch.testing.assert_close(alone(query, query), alone.output(alone.value(query)))


@pytest.mark.parametrize(("width", "heads"), [(128, 4), (112, 2), (37, 1), (24, 1)])
def test_a_column_has_as_many_heads_as_divide_its_width(width: int, heads: int) -> None:
    decoder = SpatialDecoder(NeuromorphicConfig(tier="tiny", columns=1, width=width))
    assert all(block.attention.heads == heads for block in decoder.summary_blocks)
