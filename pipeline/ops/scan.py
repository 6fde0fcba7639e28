"""The memory op: a linear associative memory, written at every token by gradient descent with momentum and decay."""

import os
from typing import Literal

import torch
from torch import Tensor

from pipeline.ops import native, scan_native
from pipeline.ops.checks import (
    TOKENS,
    cannot_run,
    check_backend_name,
    check_chunk,
    check_device,
    check_dtype,
    check_gates,
    check_segment_ids,
    check_state,
    check_value_shape,
    not_taken,
)
from pipeline.ops.scan_torch import scan_torch

Rule = Literal["titans", "delta"]
Backend = Literal["auto", "torch", "cpu", "cuda"]
State = tuple[Tensor, Tensor]


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

    Tokens are worked on in chunks, where a segment's border is a product with 0, which a number that is not finite
    survives. So a NaN or an infinity in q, k, v, the gates or the given state, and a memory that overflows, may spread
    to all tokens of its batch row and head, and to all gradients: to other segments, and to earlier tokens of its
    chunk, where the loop above would keep it to what comes after, and restart at a border. ``affine_scan`` does not
    have this.

    Args:
        q, k: queries and keys, ``[batch, sequence, heads, key dim]``; float64, float32, bfloat16 or float16.
        v: values, ``[batch, sequence, heads, value dim]``; float64, float32, bfloat16 or float16.
        alpha: forget rate per token, ``[batch, sequence, heads]``, in [0, 1]; float32 or float64, because 1 - alpha
            is 1 in bfloat16 for every useful rate.
        eta: momentum, as alpha. The rule ``delta`` ignores it, and it may be None there.
        theta: step size per token, as alpha. The gates' range is checked where the environment says MNEMOS_DEBUG=1
            and the call is not being compiled: it waits for the device.
        state: (M, S), the memory and its momentum before the first token, each ``[batch, heads, key dim, value dim]``;
            float32, or float64 when q is. Zeros when None.
        segment_ids: ``[batch, sequence]``, any integer type. The state restarts at zero where the id differs from the
            token before; ``state`` belongs to the first token's segment.
        rule: ``titans`` as above; ``delta`` without momentum (eta = 0), on the PyTorch path at about half the cost.
        backend: ``auto`` takes the native kernel of q's device where it is built, passes its check at first use, and
            takes the arguments: key dim 32, 64 or 128, value dim a multiple of 16, q, k and v all float32 or all
            bfloat16 (float32 copies where q is float16), gates and state float32. Else it takes the PyTorch path, as
            ``torch`` always does. ``cpu`` and ``cuda`` name a native kernel, and refuse what it does not take. Every
            backend takes strided tensors, of which a native kernel gets contiguous copies.
        chunk: tokens that the PyTorch path solves together. It changes speed and memory only; 64 suits head dimensions
            from 64 to 128.

    Returns:
        y, ``[batch, sequence, heads, value dim]`` in v's dtype, and the state (M, S) after the last token, in the
        state's dtype. Under ``delta``, S is the last update. Sums are in float32, or float64 when q is, also
        under autocast.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or one that a backend asked for by name
            does not take, and the message names it; or that backend is not built, or fails its check.

    Source: Titans (arXiv 2501.00663), equations 8-18, with the linear memory and the loss halved. The chunked solve is
    that of the delta rule (arXiv 2406.06484), extended to momentum; ``scan_torch`` derives it. MDN (arXiv 2605.05838)
    has another chunked form of a recurrence that contains this one.
    """
    check_arguments(q, k, v, alpha, eta, theta, state, segment_ids, rule, chunk)
    momentum = None if rule == "delta" else eta
    tensors = check_backend(backend, q, k, v, alpha, momentum, theta, state)
    if backend == "auto" and q.dtype == torch.float16:
        # No kernel takes float16, and those for float32 lose nothing of it.
        tensors |= {name: tensors[name].float() for name in ("q", "k", "v")}
    # Autocast would turn the sums to bfloat16 behind the float32 state.
    with torch.autocast(device_type=q.device.type, enabled=False):
        if _runs_natively(tensors, backend):
            y, after = scan_native.scan_native(
                tensors["q"], tensors["k"], tensors["v"], alpha, momentum, theta, state=state, segment_ids=segment_ids
            )
            return y.to(v.dtype), after
        return scan_torch(q, k, v, alpha, momentum, theta, state=state, segment_ids=segment_ids, chunk=chunk)


def check_backend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    state: State | None,
) -> dict[str, Tensor]:
    """The tensors by name, which a backend that is asked for by name takes; ``eta`` is None for ``delta``.

    Raises:
        ValueError: there is no such backend, or it does not take one of them; the message names it.
    """
    check_backend_name(backend)
    tensors = {"q": q, "k": k, "v": v, "alpha": alpha, "theta": theta}
    if eta is not None:
        tensors["eta"] = eta
    if state is not None:
        tensors |= {"state[0] (M)": state[0], "state[1] (S)": state[1]}
    if backend in ("auto", "torch"):
        return tensors
    wrong = scan_native.unsupported(backend, tensors)
    if wrong is not None:
        name, expected = wrong
        raise not_taken(backend, name, tensors[name], expected)
    return tensors


def _runs_natively(tensors: dict[str, Tensor], backend: str) -> bool:
    """Whether a native kernel takes a call that `check_backend` let pass; that one named does not run is an error."""
    q = tensors["q"]
    kind = q.device.type
    if backend == "torch" or (backend == "auto" and kind not in native.KINDS):
        return False
    if backend == "auto" and scan_native.unsupported(kind, tensors) is not None:
        return False
    device = native.place(q.device)
    key_dim = next(size for size in scan_native.KEY_DIMS if size == q.shape[-1])
    if backend == "auto":
        return scan_native.fits(device, q.dtype, key_dim)
    if (failure := scan_native.why_not(device, q.dtype, key_dim)) is not None:
        raise cannot_run(backend, failure)
    return True


def check_arguments(
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
    """Raise the ValueError of `miras_scan` for arguments that fit no backend: it names the argument and its shape."""
    if rule not in ("titans", "delta"):
        raise ValueError(f"rule is {rule!r}; expected 'titans' or 'delta'")
    check_chunk(chunk)
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {list(q.shape)}; expected [batch, sequence, heads, key dim] without a 0")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {list(k.shape)}; expected that of q, {list(q.shape)}")
    check_value_shape(v, q)
    for name, tokens in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, tokens, TOKENS)
        check_device(name, tokens, q)

    if eta is None and rule == "titans":
        raise ValueError("eta is None; the rule 'titans' needs the momentum, [batch, sequence, heads]")
    gates = {"alpha": alpha, "theta": theta}
    if rule == "titans" and eta is not None:
        gates["eta"] = eta
    check_gates(gates, q)
    if not torch.compiler.is_compiling() and os.environ.get("MNEMOS_DEBUG") == "1":
        for name, gate in gates.items():
            _check_range(name, gate)
    batch, _, heads, key_dim = q.shape
    check_state(state, (batch, heads, key_dim, v.shape[-1]), q)
    check_segment_ids(segment_ids, q)


def _check_range(name: str, gate: Tensor) -> None:
    outside = ~((gate >= 0) & (gate <= 1))  # so that a NaN is outside
    if bool(outside.any()):
        values = gate[outside]
        worst = values[(values - 0.5).abs().nan_to_num(nan=torch.inf).argmax()]
        raise ValueError(f"{name} of shape {list(gate.shape)} holds {float(worst)}; expected values in [0, 1]")
