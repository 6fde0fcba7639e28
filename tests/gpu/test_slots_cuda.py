"""Slots on a device, for which there is no kernel: what is stored and attended, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from pipeline.ops.slots import Slots
from pipeline.ops.store_slots import store_slots
from tests.ops.test_attention_slots import LIMITS, errors
from tests.ops.test_store_slots import assert_same, exact, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_is_that_of_float64(dtype: torch.dtype) -> None:
    arguments = step(tokens=40, slots=150, dim=64, dtype=dtype)
    slots, *rest = arguments
    found = store_slots(Slots(*(x.cuda() for x in slots)), *(x.cuda() for x in rest))
    assert found.keys.is_cuda
    after = Slots(*(x.cpu() for x in found.after))
    on_cpu = found._replace(after=after, **{name: getattr(found, name).cpu() for name in found._fields[:4]})
    assert_same(on_cpu, exact(arguments), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("cuts", [(), (12, 24)], ids=["one step", "three steps"])
@pytest.mark.parametrize("lengths", [[40], [9, 31]], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_outputs_and_gradients_are_near_those_of_float64(
    dtype: torch.dtype, lengths: list[int], cuts: tuple[int, ...]
) -> None:
    assert max(errors(dtype, lengths, cuts, "cuda")) < LIMITS[dtype]
