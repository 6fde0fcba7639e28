"""Attention of a transformers backbone: sequence-parallel, over packed documents, with what a system does beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import head_dim
from pipeline.ops.attention import (
    AttentionPlan,
    Rope,
    WindowCarry,
    choose_attention,
    full_attention,
    plan_full_attention,
    plan_window_attention,
    window_attention,
)
from pipeline.parallel.exchange import to_heads, to_sequence
from pipeline.parallel.topology import Topology

ATTENTION_NAME = "mnemos"
"""The name under which transformers knows our attention."""

Attention = Callable[..., Tensor]
"""attention(q, k, v, scale, *tokens): the output of attention [batch, sequence, heads / degree, dim]."""
Refine = Callable[..., Tensor]
"""refine(q, k, v, out, scale, *tokens): another output of attention, like `out` [batch, sequence, heads / degree,
dim]."""


class Beside(NamedTuple):
    """What a system does at one layer's attention."""

    gate: Tensor | None = None
    """Multiplies the output, [batch, sequence / degree, width]."""
    tokens: Sequence[Tensor] = ()
    """[batch, sequence / degree, heads, ...] each; exchanged with queries, keys and values, for `refine` or
    `attention`."""
    attention: Attention | None = None
    """In place of attention to the window, whose carry stays what it is; called as `refine` is."""
    refine: Refine | None = None
    """Called with all of the sequence and this rank's heads; q and k are unrotated."""


class Attends(Protocol):
    """What the layers of one forward pass share: attention over sequences (`AttentionCall`), or over one token per row
    when text is decoded."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, beside: Beside
    ) -> Tensor:
        """The output of attention of q, k, v [batch, heads, sequence / degree, dim], which come before RoPE: [batch,
        sequence / degree, heads, dim]."""
        ...


@dataclass
class AttentionCall:
    """What one forward pass hands to attention through transformers' layers, and gets back from it."""

    plan: AttentionPlan
    topology: Topology
    before: Sequence[WindowCarry | None]
    """By layer: what a window carries from the step before."""
    after: dict[int, WindowCarry] = field(default_factory=dict)
    """By layer, of a window: what it carries to the next step."""
    keep: Sequence[int] = ()
    """Layers whose output of attention is wanted in `kept`."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """By layer: what goes into the output projection, [batch, sequence / degree, heads, dim]."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, beside: Beside
    ) -> Tensor:
        topology = self.topology
        q, k, v, *tokens = to_heads([*(x.transpose(1, 2) for x in (query, key, value)), *beside.tokens], topology)
        if self.plan.kind == "full":
            out = full_attention(q, k, v, self.plan, scale=scaling)
        elif beside.attention is not None:
            assert self.plan.carry is not None
            index = layer_number(module)
            out = beside.attention(q, k, v, scaling, *tokens)
            self.after[index] = self.plan.carry.cut(k, v, self.before[index])
        else:
            index = layer_number(module)
            out, self.after[index] = window_attention(q, k, v, self.plan, self.before[index], scale=scaling)
        if beside.refine is not None:
            out = beside.refine(q, k, v, out, scaling, *tokens)
        (out,) = to_sequence([out], topology)
        if beside.gate is not None:
            out = out * beside.gate.view_as(out)
        if self.keep and layer_number(module) in self.keep:
            self.kept[layer_number(module)] = out
        return out


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_call: Attends,
    beside: Beside,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q, k, v [batch, heads, sequence / degree, dim], unrotated.

    What it gives goes to the layer's output projection, [batch, sequence / degree, heads, dim].
    """
    return attention_call.attend(module, query, key, value, scaling, beside), None


def layer_number(module: nn.Module) -> int:
    """Of an attention's layer. Where it is not read, one compiled block serves all layers."""
    return int(module.layer_idx)  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, attend)


def plan_attention(
    config: AttentionConfig,
    backbone: PreTrainedConfig,
    rope: Rope,
    segment_ids: Tensor,
    positions: Tensor,
    carry: WindowCarry | None,
    hidden: Tensor,
) -> AttentionPlan:
    """The plan that all layers of a step share, of segment_ids and positions [batch, sequence] (whole) and one layer's
    carry, on the device and in the dtype of `hidden`. Raises UserError as `attention_backend` does."""
    backend = attention_backend(config, backbone, hidden.device.type, hidden.dtype)
    if config.kind == "full":
        return plan_full_attention(segment_ids, positions, rope=rope, backend=backend, dtype=hidden.dtype)
    return plan_window_attention(
        segment_ids, positions, rope=rope, window=config.window, sinks=config.sinks, carry=carry, backend=backend,
        dtype=hidden.dtype,
    )  # fmt: skip


def attention_backend(config: AttentionConfig, backbone: PreTrainedConfig, device_type: str, dtype: torch.dtype) -> str:
    """The attention backend's name. Raises UserError when the one that was asked for cannot do it."""
    try:
        return choose_attention(config.kind, config.sinks, device_type, dtype, head_dim(backbone), config.backend)
    except ValueError as error:
        raise UserError(f"--model.attention.backend {config.backend}: {error}") from None


def window_edges(config: AttentionConfig, layers: int) -> dict[str, float]:
    """From where on attention does not see, in tokens by label: a layer's window, and what `layers` of them reach one
    after the other. Empty for full attention."""
    if config.kind == "full":
        return {}
    edges = {f"window of {config.window}": config.window, f"reach of {layers} layers": layers * (config.window - 1)}
    return {label: float(tokens) for label, tokens in edges.items() if tokens > 0}
