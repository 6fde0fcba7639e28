"""What a call leaves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def saved_by(call: Callable[[], T], known: Iterable[Tensor] = ()) -> tuple[T, int]:
    """What the call returns, and the bytes of the storages that it saves, each counted once.

    ``known``: tensors whose storages do not count: they would be there without it.
    """
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address comes again.
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in left_out)
    return result, total
