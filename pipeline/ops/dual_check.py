"""Checks of the arguments that the chunk-start scans share; a ValueError names the argument and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TOKENS = (torch.float64, torch.float32, torch.bfloat16)
_GATES = (torch.float64, torch.float32)


def sum_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: what sums and states are in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    chunk: int,
    *,
    state_shape: Sequence[int],
) -> None:
    """Raises ValueError. ``state_shape`` is what follows batch and heads in each part of the state."""
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; expected a positive integer")
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {list(q.shape)}; expected [batch, sequence, heads, key dim] with a token")
    batch, sequence, heads, _ = q.shape
    _check("k", k, q.shape, _TOKENS, q)
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {list(v.shape)}; expected [{batch}, {sequence}, {heads}, value dim]")
    _check("q", q, q.shape, _TOKENS, q)
    _check("v", v, v.shape, _TOKENS, q)
    for name, gate in gates.items():
        if gate is not None:
            _check(name, gate, q.shape[:3], _GATES, q)
    if state is not None:
        if len(state) != 2:
            raise ValueError(f"state holds {len(state)} tensors; expected two, (M, S)")
        for name, part in zip(("state[0] (M)", "state[1] (S)"), state, strict=True):
            _check(name, part, (batch, heads, *state_shape), (sum_dtype(q),), q)
    if segment_ids is not None:
        if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
            raise ValueError(f"segment_ids is {_name(segment_ids.dtype)}; expected an integer type")
        _check("segment_ids", segment_ids, q.shape[:2], (segment_ids.dtype,), q)


def check_weights(q: Tensor, **weights: tuple[Tensor, Sequence[int]]) -> None:
    """Raises ValueError where an initial weight has another shape, dtype or device."""
    for name, (weight, shape) in weights.items():
        _check(name, weight, shape, _TOKENS, q)


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {_name(tensor.dtype)}; expected {' or '.join(map(_name, dtypes))}")
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}; expected the device of q, {q.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
