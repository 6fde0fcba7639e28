"""The memory op: a linear associative memory, written at every token by gradient descent with momentum and decay."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.ops.scan_torch import scan_torch

Rule = Literal["titans", "delta"]
Backend = Literal["auto", "torch", "cpu", "cuda"]
State = tuple[Tensor, Tensor]

_TOKEN_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_GATE_DTYPES = (torch.float64, torch.float32)


def miras_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    state: State | None = None,
    segment_ids: Tensor | None = None,
    rule: Rule = "titans",
    backend: Backend = "auto",
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """Write every token into a matrix memory by one gradient step, and read it.

    Per batch row and head, with q, k and v as row vectors, for every token t in order::

        g_t = k_t^T (k_t M_{t-1} - v_t)        gradient of 1/2 |k_t M - v_t|^2 at the current memory
        S_t = eta_t S_{t-1} - theta_t g_t      surprise, with momentum
        M_t = (1 - alpha_t) M_{t-1} + S_t      forgetting
        y_t = q_t M_t                          read after write

    The result is that of this loop to rounding, whatever ``chunk`` is: only the order of the sums depends on it.
    Everything is differentiable once, the given and the returned state included. The op computes what it is given:
    gates that make the rule diverge (momentum .9 with step size 1, say) give large numbers, not an error.

    Args:
        q, k: queries and keys, ``[batch, sequence, heads, key dim]``; float64, float32 or bfloat16.
        v: values, ``[batch, sequence, heads, value dim]``; float64, float32 or bfloat16.
        alpha: forget rate per token, ``[batch, sequence, heads]``, in [0, 1]; float32 or float64, because 1 - alpha
            is 1 in bfloat16 for every useful rate.
        eta: momentum, as alpha. The rule ``delta`` ignores it, and it may be None there.
        theta: step size per token, as alpha. The gates' range is not checked: that would wait for the device.
        state: (M, S), the memory and its momentum before the first token, each ``[batch, heads, key dim, value dim]``;
            float32, or float64 when q is. Zeros when None.
        segment_ids: ``[batch, sequence]``, any integer type. The state restarts at zero where the id differs from the
            token before; ``state`` belongs to the first token's segment.
        rule: ``titans`` as above; ``delta`` without momentum (eta = 0), at about half the cost.
        backend: ``auto`` takes the fastest that fits; ``torch`` runs on any device.
        chunk: tokens solved together. It changes speed and memory only; 64 suits head dimensions from 64 to 128.

    Returns:
        y, ``[batch, sequence, heads, value dim]`` in v's dtype, and the state (M, S) after the last token, in the
        state's dtype. Under ``delta``, S is the last update. Sums are in float32, or float64 when q is, also
        under autocast.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.

    Source: Titans (arXiv 2501.00663), equations 8-18, with the linear memory and the loss halved. The chunked solve is
    that of the delta rule (arXiv 2406.06484), extended to momentum; ``scan_torch`` derives it.
    """
    _check(q, k, v, alpha, eta, theta, state, segment_ids, rule, chunk)
    if backend in ("cpu", "cuda"):
        raise ValueError(f"backend {backend!r} is not built; use 'auto' or 'torch'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'torch', 'cpu' or 'cuda'")
    # Autocast would turn the sums to bfloat16 behind the float32 state.
    with torch.autocast(device_type=q.device.type, enabled=False):
        return scan_torch(
            q, k, v, alpha, None if rule == "delta" else eta, theta, state=state, segment_ids=segment_ids, chunk=chunk
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    state: State | None,
    segment_ids: Tensor | None,
    rule: str,
    chunk: int,
) -> None:
    if rule not in ("titans", "delta"):
        raise ValueError(f"rule is {rule!r}; expected 'titans' or 'delta'")
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; expected a positive integer")
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {_shape(q)}; expected [batch, sequence, heads, key dim] with a token at least")
    batch, sequence, heads, key_dim = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k has shape {_shape(k)}; expected that of q, {_shape(q)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {_shape(v)}; expected [{batch}, {sequence}, {heads}, value dim]")
    for name, tokens in (("q", q), ("k", k), ("v", v)):
        _check_dtype(name, tokens, _TOKEN_DTYPES)
        _check_device(name, tokens, q)

    if eta is None and rule == "titans":
        raise ValueError("eta is None; the rule 'titans' needs the momentum, [batch, sequence, heads]")
    gates = {"alpha": alpha, "theta": theta}
    if rule == "titans" and eta is not None:
        gates["eta"] = eta
    for name, gate in gates.items():
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} has shape {_shape(gate)}; expected [{batch}, {sequence}, {heads}]")
        _check_dtype(name, gate, _GATE_DTYPES)
        _check_device(name, gate, q)

    if state is not None:
        if len(state) != 2:
            raise ValueError(f"state holds {len(state)} tensors; expected two, (M, S)")
        expected = (batch, heads, key_dim, v.shape[-1])
        for name, part in zip(("state[0] (M)", "state[1] (S)"), state, strict=True):
            if part.shape != expected:
                raise ValueError(f"{name} has shape {_shape(part)}; expected {list(expected)}")
            _check_dtype(name, part, (torch.float64 if q.dtype == torch.float64 else torch.float32,))
            _check_device(name, part, q)

    if segment_ids is not None:
        if segment_ids.shape != q.shape[:2]:
            raise ValueError(f"segment_ids has shape {_shape(segment_ids)}; expected [{batch}, {sequence}]")
        if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
            raise ValueError(f"segment_ids is {_name(segment_ids.dtype)}; expected an integer type")
        _check_device("segment_ids", segment_ids, q)


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {_name(tensor.dtype)}; expected {' or '.join(map(_name, allowed))}")


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}; expected the device of q, {q.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
