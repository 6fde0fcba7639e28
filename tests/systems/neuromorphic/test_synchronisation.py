"""Between logged steps nothing in the loop over spans waits for the device: no operation hands a number to Python, or
has a result whose size depends on what the numbers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.systems.neuromorphic.phases import USES
from tests.systems.neuromorphic.small import SIZES, documents, small_model

WAITING = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "unique_dim", "unique_consecutive", "_unique2",
    "is_nonzero", "equal", "allclose", "repeat_interleave", "bincount", "_to_cpu",
}  # fmt: skip


class NothingWaits(TorchDispatchMode):
    """Fails where an operation waits for the device on a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        if name == "index":  # by bool it looks for the places first
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "an index of bool waits for the device"
        return func(*args, **(kwargs or {}))


def test_what_waits_is_found() -> None:
    x = torch.ones(3)
    for waits in (lambda: x[x > 0], lambda: x.sum().item(), lambda: bool(x[0]), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
            waits()


@pytest.mark.parametrize("phase", ["A", "B", "C"])
def test_a_step_that_is_not_logged_waits_for_nothing(phase: str) -> None:
    model = small_model()
    ids = torch.randint(3, SIZES.vocab, (2, 4 * SIZES.span), generator=torch.Generator().manual_seed(0))
    ids[:, SIZES.span + 2] = 2
    labels, segments, positions = documents(ids)
    first = model(ids, labels, segments, positions, None, USES[phase])
    with NothingWaits():
        out = model(ids, labels, segments + 9, positions, first.state, USES[phase])
        assert out.losses is not None
        (out.losses.sum() + sum(out.penalties.values())).backward()
