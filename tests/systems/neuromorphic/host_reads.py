"""Finds where a step of training reads values of the device on the host, and runs such steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.batch import TokenBatch
from pipeline.parallel.loss import scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.system import Carry, StepContext, System

READS = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "is_nonzero", "equal", "bincount",
    "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
"""Operators whose result, or its shape, is known once the device is done."""
COPIES = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "__array__"}
"""Methods that read a tensor by another way than an operator."""


class HostRead(AssertionError):
    """A value was read."""


class NoHostReads(TorchDispatchMode):
    """Raises HostRead at the operator that reads, in the forward or the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        """Names of all operators."""
        self._copies = _NoCopies()

    def __enter__(self) -> NoHostReads:
        super().__enter__()
        self._copies.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._copies.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if name in READS:
            raise HostRead(name)
        if name == "repeat_interleave" and "output_size" not in (kwargs or {}):
            raise HostRead(name)
        if name.startswith(("index", "_index_put")) and len(args) > 1 and _has_mask(args[1]):
            raise HostRead(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in COPIES:
            raise HostRead(COPIES[func])
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    places: Iterable[Any] = indices if isinstance(indices, (list, tuple)) else ()
    return any(isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places)


def steps_of(system: System[Any], phase: str, device: torch.device) -> Callable[[], None]:
    """A function that runs the forward and backward pass of a next step of training that is not logged, on batches that
    are on the device, and none of the update; three steps are read."""
    model = system.build()
    system.initialise(model, Topology())
    model.to(device).train()
    chosen = next(found for found in system.phases(model) if found.name == phase)
    trained = {name for group in chosen.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    loader = system.loader(chosen, Topology())
    batches: list[TokenBatch] = [batch for _ in range(3) for batch in loader.next_step()]
    counts = [system.count(batch) for batch in batches]
    rows = iter([(batch.to(device), count) for batch, count in zip(batches, counts, strict=True)])
    carry: Carry = {}
    step = 0

    def run() -> None:
        nonlocal carry, step
        step += 1
        batch, count = next(rows)
        output = system.forward(model, batch, carry, StepContext(Topology(), 0, phase, step))
        scaled_loss(output.sums, count, Topology()).backward()
        carry = {
            name: type(entry)(entry.tensor.detach(), entry.streams, entry.heads) for name, entry in output.carry.items()
        }

    return run
