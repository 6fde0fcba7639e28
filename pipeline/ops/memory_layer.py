"""The memory op as a layer for a model of your own (docs/use_the_op.md)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.ops.checks import check_device, check_segment_ids, sum_dtype
from pipeline.ops.convolution import causal_convolution
from pipeline.ops.gates import (
    MAX_MOMENTUM,
    GateLinear,
    Gates,
    bounded_gates,
    initial_alpha_logits,
    initial_beta_logits,
    initial_eta_logit,
)
from pipeline.ops.scan import Backend, Rule, miras_scan

GATE_WEIGHT_STD = 0.02
"""Of the initial projections to gate logits: what a token adds to a logit is small beside the bias."""
SMALLEST_NORM = 1e-3
"""A query or key shorter than this is not stretched to unit length: the gradient of padding would have no bound."""


class MemoryState(NamedTuple):
    """What a `MemoryLayer` carries from one piece of a sequence to the next."""

    memory: Tensor
    """M [batch, heads, head dim, value dim], float32 (float64 for float64 inputs)."""
    momentum: Tensor
    """S, like memory."""
    tail: Tensor
    """The last conv - 1 tokens before the convolution [batch, conv - 1, heads, 2 head dim + value dim]."""
    tail_segments: Tensor
    """Their segment ids [batch, conv - 1] int64; -1 where there is no token."""

    def detach(self) -> MemoryState:
        """The same values without their history: the next piece is not trained through."""
        return MemoryState(*(part.detach() for part in self))


class MemoryLayer(nn.Module):
    """A neural long-term memory per head, written at every token and read after it; causal, linear in the length.

    Projections, a short causal convolution, queries and keys of unit length, `miras_scan` with gates in the region
    where it cannot grow (`pipeline.ops.gates`), an RMS norm of each head's reads, a low-rank sigmoid gate, and an
    output projection that starts at zero. It has no norm of its input and no residual connection of its own:
    ``x + layer(norm(x))[0]``.

    Args:
        width: size of a token, in and out.
        heads: memories; ``heads * head_dim`` need not be ``width``.
        head_dim: size of a query and of a key. The native kernels take 32, 64 and 128.
        value_dim: size of a value; ``head_dim`` when None. The native kernels take multiples of 16.
        rule: ``titans`` (momentum and forgetting) or ``delta`` (no momentum).
        conv: taps of the causal convolution on queries, keys and values; 2 or more.
        gate_rank: rank of the output gate.
        momentum: initial momentum of every head, above 0 and below 0.99.
        step_size: initial step sizes of the first and the last head; the others lie between on a log scale.
        half_life: initial forget half-lives in tokens, as step_size.
        norm_eps: epsilon of the norm of the reads.
        backend, chunk: see `miras_scan`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range, and the message names it.

    Source: Titans (arXiv 2501.00663), section 4.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        head_dim: int = 64,
        value_dim: int | None = None,
        *,
        rule: Rule = "titans",
        conv: int = 4,
        gate_rank: int = 64,
        momentum: float = 0.1,
        step_size: tuple[float, float] = (0.5, 0.002),
        half_life: tuple[float, float] = (1e3, 1e6),
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
        chunk: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        if rule not in ("titans", "delta"):
            raise ValueError(f"rule is {rule!r}; expected 'titans' or 'delta'")
        sizes = {"width": width, "heads": heads, "head_dim": head_dim, "value_dim": value_dim, "gate_rank": gate_rank}
        for name, size in {**sizes, "conv": conv}.items():
            least = 2 if name == "conv" else 1
            if size < least:
                raise ValueError(f"{name} is {size}; expected {least} or more")
        if not 0 < momentum < MAX_MOMENTUM:
            raise ValueError(f"momentum is {momentum}; expected a value between 0 and {MAX_MOMENTUM}")
        for name, ends in (("step_size", step_size), ("half_life", half_life)):
            if not min(ends) > 0:
                raise ValueError(f"{name} is {ends}; expected two values above 0")
        self.width, self.heads, self.head_dim, self.value_dim = width, heads, head_dim, value_dim
        self.rule, self.conv_taps, self.norm_eps, self.backend, self.chunk = rule, conv, norm_eps, backend, chunk
        self.momentum, self.step_size, self.half_life = momentum, step_size, half_life

        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False, **to)
        self.k_proj = nn.Linear(width, heads * head_dim, bias=False, **to)
        self.v_proj = nn.Linear(width, heads * value_dim, bias=False, **to)
        self.alpha_proj = GateLinear(width, heads, **to)
        self.beta_proj = GateLinear(width, heads, **to)
        self.eta_logits = nn.Parameter(torch.empty(heads, **to)) if rule == "titans" else None
        self.conv = nn.Parameter(torch.empty(heads, conv, 2 * head_dim + value_dim, **to))
        self.head_norm = nn.Parameter(torch.empty(heads, value_dim, **to))
        self.gate_down = nn.Linear(width, gate_rank, bias=False, **to)
        self.gate_up = nn.Linear(gate_rank, heads * value_dim, **to)
        self.o_proj = nn.Linear(heads * value_dim, width, bias=False, **to)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values: random ones from torch's generator, gates as step_size, half_life and momentum say."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.gate_down, self.gate_up):
            nn.init.normal_(proj.weight, std=1 / math.sqrt(proj.in_features))
        for gate in (self.alpha_proj, self.beta_proj):
            nn.init.normal_(gate.weight, std=GATE_WEIGHT_STD)
        self.alpha_proj.bias.copy_(initial_alpha_logits(self.heads, self.half_life))
        momentum = 0.0 if self.eta_logits is None else self.momentum
        self.beta_proj.bias.copy_(initial_beta_logits(self.heads, momentum, self.step_size))
        if self.eta_logits is not None:
            nn.init.constant_(self.eta_logits, initial_eta_logit(self.momentum))
        bound = 1 / math.sqrt(self.conv_taps)
        nn.init.uniform_(self.conv, -bound, bound)
        nn.init.ones_(self.head_norm)
        nn.init.zeros_(self.gate_up.bias)
        nn.init.zeros_(self.o_proj.weight)

    def forward(
        self, x: Tensor, segment_ids: Tensor | None = None, state: MemoryState | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Write the tokens and read after each.

        Args:
            x: ``[batch, sequence, width]``.
            segment_ids: ``[batch, sequence]``, any integer type: the document of each token, where several are packed
                into one row. A document never sees another one. None: one document, of id 0.
            state: what the call on the tokens before these returned. It goes on in a row whose first token has the id
                of the last token before it; a row that begins another document begins empty. None: empty.

        Returns:
            y, like x, and the state after the last token. Gradients flow into the given state and from the returned
            one: `MemoryState.detach` cuts them.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device, and the message names it.
        """
        if x.dim() != 3 or x.shape[-1] != self.width or 0 in x.shape:
            raise ValueError(f"x has shape {list(x.shape)}; expected [batch, sequence, {self.width}] without a 0")
        check_segment_ids(segment_ids, x, "x")
        if segment_ids is None:
            segment_ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        qkv = torch.cat([self._by_head(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        if state is None:
            state = self.empty_state(qkv)
        self._check_state(state, qkv)

        tokens = torch.cat([state.tail.to(qkv.dtype), qkv], dim=1)
        segments = torch.cat([state.tail_segments, segment_ids.to(torch.int64)], dim=1)
        mixed = F.silu(causal_convolution(tokens, segments, self.conv.to(qkv.dtype)))
        q, k, v = mixed.split([self.head_dim, self.head_dim, self.value_dim], dim=-1)
        q, k = (F.normalize(z.to(sum_dtype(z)), dim=-1, eps=SMALLEST_NORM).to(z.dtype) for z in (q, k))
        gates = self.gates(x)
        same_document = (state.tail_segments[:, -1] == segments[:, self.conv_taps - 1])[:, None, None, None]
        before = (state.memory.where(same_document, 0), state.momentum.where(same_document, 0))
        inputs = [q, k, v, gates.alpha, gates.eta, gates.theta]
        read, (memory, momentum) = miras_scan(
            *inputs, state=before, segment_ids=segment_ids, rule=self.rule, backend=self.backend, chunk=self.chunk
        )

        read = F.rms_norm(read, (self.value_dim,), eps=self.norm_eps) * self.head_norm
        gate = torch.sigmoid(self.gate_up(self.gate_down(x)))
        y = self.o_proj(rearrange(read, "batch sequence heads dim -> batch sequence (heads dim)").to(gate.dtype) * gate)
        length = x.shape[1]
        return y, MemoryState(memory, momentum, tokens[:, length:], segments[:, length:])

    def _by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch sequence (heads dim) -> batch sequence heads dim", heads=self.heads)

    def gates(self, x: Tensor) -> Gates:
        """Forget rate, momentum and step size of tokens [batch, sequence, width]: each [batch, sequence, heads]."""
        return bounded_gates(self.alpha_proj(x), self.beta_proj(x), self.eta_logits)

    def empty_state(self, like: Tensor) -> MemoryState:
        """The state before any token, for as many rows as ``like`` has and on its device."""
        matrix, _, tail, ids = self._state_shapes(like.shape[0])
        accumulate_dtype = sum_dtype(like)
        return MemoryState(
            like.new_zeros(matrix, dtype=accumulate_dtype),
            like.new_zeros(matrix, dtype=accumulate_dtype),
            like.new_zeros(tail),
            torch.full(ids, -1, dtype=torch.int64, device=like.device),
        )

    def _state_shapes(self, batch: int) -> tuple[tuple[int, ...], ...]:
        """Of the parts of a `MemoryState`, in order."""
        matrix = (batch, self.heads, self.head_dim, self.value_dim)
        tail = (batch, self.conv_taps - 1, self.heads, 2 * self.head_dim + self.value_dim)
        return matrix, matrix, tail, tail[:2]

    def _check_state(self, state: MemoryState, like: Tensor) -> None:
        for name, part, shape in zip(MemoryState._fields, state, self._state_shapes(like.shape[0]), strict=True):
            if part.shape != shape:
                raise ValueError(f"state.{name} has shape {list(part.shape)}; expected {list(shape)}")
            check_device(f"state.{name}", part, like, "x")

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, head_dim={self.head_dim}, value_dim={self.value_dim}"
        return f"{self.width}, {sizes}, rule={self.rule!r}"
