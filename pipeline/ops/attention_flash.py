"""Attention through flash-attention 2, 3 or 4, whichever is installed (https://github.com/Dao-AILab/flash-attention).

Documents are the "sequences" of the packages' public varlen function, so none sees another and no mask exists. With a
carry, the first document of a row simply has more keys than queries; the kernels align causality to the last key.
The public functions have no differentiable log-sum-exp, so they cannot serve windows with sinks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.ops.attention_sinks import WindowCarry
from pipeline.ops.rope import Rotation, rotate

MODULES = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn"}
CAPABILITIES = {"flash4": (9, 12), "flash3": (9, 9), "flash2": (8, 12)}
"""First and last major compute capability of the GPUs that each version has forward and backward kernels for."""


@functools.cache
def varlen_function(backend: str) -> Callable[..., Tensor] | None:
    """The public `flash_attn_varlen_func` of a version, or None where it is not installed.

    Imported rather than looked up: versions 2 and 4 share the top-level name `flash_attn`, and a build for another
    torch is found by name but fails to load.
    """
    try:
        return importlib.import_module(MODULES[backend]).flash_attn_varlen_func
    except (ImportError, OSError, AttributeError, RuntimeError):
        return None


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """The documents of one step as flash-attention sees them."""

    queries: Tensor
    """[documents + 1] int32: where each document's queries begin in the rows laid end to end."""
    keys: Tensor
    """[documents + 1] int32: the same for keys, which include what a row's first document left in the carry."""
    longest_queries: int
    longest_keys: int
    carried: tuple[int, ...]
    """Carry tokens in use, per row."""

    @classmethod
    def build(cls, segment_ids: Tensor, carry_ids: Tensor | None) -> VarlenPlan:
        """Waits for the device once: the kernels need lengths on the host."""
        batch, tokens = segment_ids.shape
        used = torch.zeros_like(segment_ids[:, 0])
        if carry_ids is not None:
            used = (carry_ids == segment_ids[:, :1]).sum(1)
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        queries = torch.cat((starts, starts.new_full((1,), batch * tokens)))
        # A row's carried keys come right before its own, so they shift every later boundary, its own start excepted.
        before = torch.cat((used.new_zeros(1), used.cumsum(0)))
        shift = before[queries // tokens] + used[(queries // tokens).clamp(max=batch - 1)] * (queries % tokens > 0)
        keys = queries + shift
        lengths = torch.cat((queries.diff().max()[None], keys.diff().max()[None], used)).tolist()
        return cls(queries.to(torch.int32), keys.to(torch.int32), lengths[0], lengths[1], tuple(lengths[2:]))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carry: WindowCarry | None,
    plan: VarlenPlan,
    rotation: Rotation,
    window: int | None,
    backend: str,
    scale: float,
) -> Tensor:
    """Causal attention within documents, and within `window` if it is not None.

    Shapes as in `attention.window_attention`; q and k before RoPE, carry.k after it.
    """
    keys = _rows(rotate(k, rotation), carry.k if carry else None, plan.carried)
    values = _rows(v, carry.v if carry else None, plan.carried)
    function = varlen_function(backend)
    assert function is not None, f"{backend} went missing after choose_attention"
    out = function(
        rotate(q, rotation).flatten(0, 1),
        keys,
        values,
        cu_seqlens_q=plan.queries,
        cu_seqlens_k=plan.keys,
        max_seqlen_q=plan.longest_queries,
        max_seqlen_k=plan.longest_keys,
        softmax_scale=scale,
        causal=True,
        **({} if window is None else {"window_size": (window - 1, 0)}),
    )
    # Version 4 returns the log-sum-exp too.
    out = out[0] if isinstance(out, tuple) else out
    return out.view(q.shape)


def _rows(x: Tensor, before: Tensor | None, carried: tuple[int, ...]) -> Tensor:
    """x [batch, tokens, heads, dim] as [total, heads, dim], each row behind what it uses of `before`."""
    if before is None or not any(carried):
        return x.flatten(0, 1)
    pieces = []
    for row, earlier, count in zip(x, before.to(x.dtype), carried, strict=True):
        pieces += [earlier[earlier.shape[0] - count :], row]
    return torch.cat(pieces)
