"""Checks of the arguments that the scans share; a ValueError names the argument and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TOKENS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What tokens may be in."""
GATES = (torch.float64, torch.float32)
"""What gates may be in: 1 - alpha is 1 in half precision for every useful rate."""
BACKENDS = ("auto", "torch", "cpu", "cuda")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def sum_dtype(*tokens: Tensor) -> torch.dtype:
    """What sums and states are in: float64 where a token's tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tokens) else torch.float32


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError where the dtype is another."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {dtype_name(tensor.dtype)}; expected {' or '.join(map(dtype_name, allowed))}")


def check_device(name: str, tensor: Tensor, like: Tensor, of: str = "q") -> None:
    """Raises ValueError where it is not on the device of ``like``, which the caller calls ``of``."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; expected the device of {of}, {like.device}")


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: tuple[torch.dtype, ...], like: Tensor, of: str = "q"
) -> None:
    """Raises ValueError where shape, dtype or device are others."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    check_dtype(name, tensor, dtypes)
    check_device(name, tensor, like, of)


def check_segment_ids(segment_ids: Tensor | None, like: Tensor, of: str = "q") -> None:
    """Raises ValueError for ids that are not integers [batch, sequence], the first dimensions of ``like``."""
    if segment_ids is None:
        return
    if segment_ids.shape != like.shape[:2]:
        raise ValueError(f"segment_ids has shape {list(segment_ids.shape)}; expected {list(like.shape[:2])}")
    if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
        raise ValueError(f"segment_ids is {dtype_name(segment_ids.dtype)}; expected an integer type")
    check_device("segment_ids", segment_ids, like, of)


def check_chunk(chunk: int) -> None:
    """Raises ValueError for what is not a positive integer."""
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; expected a positive integer")


def check_clip(clip: float | None) -> None:
    """Raises ValueError for a largest norm that is not positive."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; expected a value above 0, or None")


def check_value_shape(v: Tensor, q: Tensor) -> None:
    """Raises ValueError where v is not [batch, sequence, heads, value dim] of q's tokens."""
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        batch, sequence, heads = q.shape[:3]
        raise ValueError(f"v has shape {list(v.shape)}; expected [{batch}, {sequence}, {heads}, value dim]")


def check_gates(gates: Mapping[str, Tensor | None], q: Tensor) -> None:
    """Raises ValueError where a gate, by its name, is not [batch, sequence, heads] in float32 or float64."""
    for name, gate in gates.items():
        if gate is not None:
            check_tensor(name, gate, q.shape[:3], GATES, q)


def check_state(state: tuple[Tensor, Tensor] | None, shape: Sequence[int], q: Tensor) -> None:
    """Raises ValueError for what is not a pair (M, S), each of ``shape`` in the dtype of the sums."""
    if state is None:
        return
    if not isinstance(state, (tuple, list)):
        raise ValueError(f"state is of type {type(state).__name__}; expected a pair of tensors, (M, S)")
    if len(state) != 2:
        raise ValueError(f"state holds {len(state)} tensors; expected two, (M, S)")
    for name, part in zip(("state[0] (M)", "state[1] (S)"), state, strict=True):
        if not isinstance(part, Tensor):
            raise ValueError(f"{name} is of type {type(part).__name__}; expected a tensor of {list(shape)}")
        check_tensor(name, part, shape, (sum_dtype(q),), q)


def check_chunk_start(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor | None],
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    chunk: int,
    *,
    state_shape: Sequence[int],
) -> None:
    """Raises ValueError for arguments of a chunk-start scan that do not agree.

    ``state_shape`` is what follows batch and heads in each part of the state.
    """
    check_chunk(chunk)
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {list(q.shape)}; expected [batch, sequence, heads, key dim] with a token")
    check_tensor("k", k, q.shape, TOKENS, q)
    check_value_shape(v, q)
    for name, tokens in (("q", q), ("v", v)):
        check_dtype(name, tokens, TOKENS)
        check_device(name, tokens, q)
    check_gates(gates, q)
    check_state(state, (q.shape[0], q.shape[2], *state_shape), q)
    check_segment_ids(segment_ids, q)


def check_initial(q: Tensor, v: Tensor, initial: Mapping[str, Tensor], shape: Sequence[int]) -> None:
    """Raises ValueError for a deep memory whose values are not as wide as its keys, or where an initial weight, by its
    name, is not of ``shape``."""
    if v.shape != q.shape:
        raise ValueError(f"v has shape {list(v.shape)}; expected that of q, {list(q.shape)}")
    for name, weight in initial.items():
        check_tensor(name, weight, shape, TOKENS, q)


def check_backend_name(backend: str) -> None:
    """Raises ValueError where there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'torch', 'cpu' or 'cuda'")


def not_taken(backend: str, name: str, tensor: Tensor, expected: str) -> ValueError:
    """That a backend asked for by name does not take a tensor, and what it expects."""
    found = f"{name} is {dtype_name(tensor.dtype)} {list(tensor.shape)} with strides {list(tensor.stride())}"
    return ValueError(f"{found} on {tensor.device}; backend {backend!r} expects {expected}: use 'auto' or 'torch'")


def cannot_run(backend: str, failure: str) -> ValueError:
    """That a backend asked for by name cannot run here."""
    return ValueError(f"backend {backend!r} cannot run: {failure}: use 'auto' or 'torch'")
