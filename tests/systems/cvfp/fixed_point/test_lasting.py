"""Contexts are kept from pass to pass beside the allocator's heap."""

from __future__ import annotations

import pytest
import torch

from pipeline.systems.cvfp.fixed_point.lasting import lasting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 3)])
def test_a_copy_has_the_same_numbers_and_its_own_pages(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=dtype)
    kept = lasting(tensor.transpose(0, 1))
    assert torch.equal(kept, tensor.transpose(0, 1)) and kept.dtype == dtype
    if tensor.numel():
        assert kept.is_contiguous() and kept.data_ptr() % 4096 == 0
        before = kept.clone()
        tensor.zero_()
        assert torch.equal(kept, before)
