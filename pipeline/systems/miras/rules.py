"""The family of memories: one scan each, with its error map, retention, memory structure and gates.

Every rule has a state of two tensors (M, S), each [batch, heads, rows, dim] with dim = head_dim, and zeros are the
empty state: a deep memory's state is what has been added to its learned initial weights. An empty memory reads as zero:
where the op's does not (memora, mlp, swiglu), the read of the empty memory is taken off. It is the same for every
document, so the persistent pairs can say it as well, and the norm behind the read would see little else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import UserError
from pipeline.ops import chunks, scan_native
from pipeline.ops.checks import dtype_name, sum_dtype
from pipeline.ops.dual_maps import ErrorMap, HuberError, Link, PNormError, QNormLink, SoftmaxLink, squared_error
from pipeline.ops.dual_scan import dual_scan
from pipeline.ops.gates import Gates, bounded_gates
from pipeline.ops.mlp_scan import gelu, mlp_scan
from pipeline.ops.scan import miras_scan
from pipeline.ops.swiglu_scan import Weights, apply_swiglu, swiglu_scan
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.limits import largest_step

State = tuple[Tensor, Tensor]


def empty_read_bytes(tokens: int, hidden: int) -> int:
    """What the read of an empty deep memory keeps; tokens is those of all rows and heads."""
    return 4 * tokens * 8 * hidden


class MemoryRule(nn.Module):
    """What the memories of one layer do with their tokens. Parameters have the heads first and hold all of them."""

    empty_read = False
    """Whether an empty memory's raw read is something else than zero."""
    own_size = False
    """Whether the size of reads is that of the rule's weights, not of the values: it corrects no error."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.step = largest_step(config)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha_logits: Tensor,
        beta_logits: Tensor,
        eta_logits: Tensor | None,
        state: State,
        segment_ids: Tensor | None,
        heads: slice,
    ) -> tuple[Tensor, State, Gates]:
        """Write the tokens and read after (swiglu: before) each.

        q, k [batch, sequence, h, dim] of unit length, v alike; alpha_logits, beta_logits [batch, sequence, h]; state
        before the first token; segment_ids [batch, sequence]. `heads` is which of the layer's heads the h are.
        eta_logits [heads] are those of the whole layer, None for a rule without momentum. Returns the reads (like v),
        the state after the last token, and the gates.
        """
        if (eta_logits is not None) != self.config.has_momentum:
            raise ValueError(f"the rule {self.config.rule} {'has' if self.config.has_momentum else 'has no'} momentum")
        own = None if eta_logits is None else eta_logits[heads]
        gates = bounded_gates(alpha_logits, beta_logits, own, self.step, self.config.stretch)
        if not self.empty_read:
            return *self.scan(q, k, v, gates, state, segment_ids, heads), gates
        # In bfloat16 the difference of the two reads would be mostly rounding.
        y, after = self.scan(q, k, v.to(sum_dtype(q)), gates, state, segment_ids, heads)
        return (y - self._empty_read(q, heads)).to(v.dtype), after, gates

    def _empty_read(self, q: Tensor, heads: slice) -> Tensor:
        state = self.empty_state(q.shape[0], heads, q)
        # What a deep memory's hidden layer keeps would be most of what the branch keeps.
        if torch.is_grad_enabled() and empty_read_bytes(q.shape[:-1].numel(), self.config.hidden) > chunks.KEEP:
            return checkpoint(self.recall, q, state, heads, use_reentrant=False, preserve_rng_state=False)
        return self.recall(q, state, heads)

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, segment_ids: Tensor | None, heads: slice
    ) -> tuple[Tensor, State]:
        """The op: raw reads, like v, and the state after."""
        raise NotImplementedError

    def recall(self, q: Tensor, state: State, heads: slice) -> Tensor:
        """The raw read of the state by queries [batch, sequence, h, dim], in the state's dtype."""
        return torch.einsum("bthk,bhkv->bthv", q.to(state[0].dtype), state[0])

    def read(self, q: Tensor, state: State, heads: slice) -> Tensor:
        """What queries [batch, sequence, h, dim] find in the state as it is, in the state's dtype; nothing is written.

        A rule with parameters of its own needs them whole, as within a forward pass.
        """
        found = self.recall(q, state, heads)
        if self.empty_read:
            found = found - self.recall(q, self.empty_state(q.shape[0], heads, state[0]), heads)
        return found

    def empty_state(self, batch: int, heads: slice, like: Tensor) -> State:
        """(M, S) before any token, on the device of `like`; float64 when it is, else float32."""
        accumulate_dtype = sum_dtype(like)
        shape = (batch, heads.stop - heads.start, self.config.state_rows, self.config.head_dim)
        return like.new_zeros(shape, dtype=accumulate_dtype), like.new_zeros(shape, dtype=accumulate_dtype)


class ExactRule(MemoryRule):
    """titans and delta: a matrix, |e|^2 / 2, every gradient at the token's own memory."""

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, segment_ids: Tensor | None, heads: slice
    ) -> tuple[Tensor, State]:
        config = self.config
        return miras_scan(
            q, k, v, gates.alpha, gates.eta, gates.theta, state=state, segment_ids=segment_ids,
            rule="titans" if config.has_momentum else "delta", backend=config.backend, chunk=config.chunk,
        )  # fmt: skip


class DualRule(MemoryRule):
    """A matrix that is a link of its dual state, with an error map: the chunk-start scan."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.error: ErrorMap = squared_error
        self.link: Link | None = None
        self.clip: float | None = None

    def threshold(self, k: Tensor, heads: slice) -> Tensor | None:
        """The error map's threshold per token, [batch, sequence, h] in float32 or float64."""
        return None

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, segment_ids: Tensor | None, heads: slice
    ) -> tuple[Tensor, State]:
        return dual_scan(
            q, k, v, gates.alpha, gates.eta if self.config.has_momentum else None, gates.theta, error=self.error,
            link=self.link, threshold=self.threshold(k, heads), clip=self.clip, state=state, segment_ids=segment_ids,
            chunk=self.config.gradient_chunk,
        )  # fmt: skip

    def recall(self, q: Tensor, state: State, heads: slice) -> Tensor:
        memory = state[0] if self.link is None else self.link(state[0])
        return torch.einsum("bthk,bhkv->bthv", q.to(memory.dtype), memory)


class MonetaRule(DualRule):
    """p-norm bias and q-norm retention."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.error = PNormError(config.moneta.p, config.moneta.smooth)
        self.link = QNormLink(config.moneta.q, config.moneta.link)
        self.clip = config.moneta.clip


class YaadRule(DualRule):
    """Huber bias; the threshold is learned, per head or as a function of the token's key."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.error = HuberError(config.yaad.form)
        self.delta_bias = nn.Parameter(torch.empty(config.heads))
        per_token = config.yaad.threshold == "token"
        self.delta_weight = nn.Parameter(torch.empty(config.heads, config.head_dim)) if per_token else None

    def threshold(self, k: Tensor, heads: slice) -> Tensor | None:
        accumulate_dtype = sum_dtype(k)
        logits = self.delta_bias[heads].to(accumulate_dtype).expand(k.shape[:3])
        if self.delta_weight is not None:
            logits = logits + torch.einsum(
                "bthd,hd->bth", k.to(accumulate_dtype), self.delta_weight[heads].to(accumulate_dtype)
            )
        return F.softplus(logits)


class MemoraRule(DualRule):
    """Softmax retention: the state holds logits, the memory scaled distributions."""

    empty_read = True

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.link = SoftmaxLink(config.memora.scale)


class MlpRule(MemoryRule):
    """A perceptron with one hidden layer."""

    empty_read = True

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        shape = (config.heads, config.mlp.hidden * config.head_dim, config.head_dim)
        self.w_in = nn.Parameter(torch.empty(shape))
        self.w_out = nn.Parameter(torch.empty(shape))

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, segment_ids: Tensor | None, heads: slice
    ) -> tuple[Tensor, State]:
        config = self.config
        return mlp_scan(
            q, k, v, gates.alpha, gates.eta if config.has_momentum else None, gates.theta,
            (self.w_in[heads], self.w_out[heads]), clip=config.mlp.clip, state=state, segment_ids=segment_ids,
            chunk=config.gradient_chunk,
        )  # fmt: skip

    def recall(self, q: Tensor, state: State, heads: slice) -> Tensor:
        accumulate_dtype = state[0].dtype
        initial = (self.w_in[heads].to(accumulate_dtype), self.w_out[heads].to(accumulate_dtype))
        below, above = (w + part for w, part in zip(initial, state[0].chunk(2, dim=-2), strict=True))
        hidden, _ = gelu(torch.einsum("bthd,bhfd->bthf", q.to(accumulate_dtype), below))
        return torch.einsum("bthf,bhfd->bthd", hidden, above)


class SwigluRule(MemoryRule):
    """SwiGLU fast weights in large chunks: a chunk is read with the weights of its start."""

    empty_read = True
    own_size = True

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        shape = (config.heads, config.swiglu.hidden * config.head_dim, config.head_dim)
        self.w_gate = nn.Parameter(torch.empty(shape))
        self.w_up = nn.Parameter(torch.empty(shape))
        self.w_down = nn.Parameter(torch.empty(shape))

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, segment_ids: Tensor | None, heads: slice
    ) -> tuple[Tensor, State]:
        config = self.config
        return swiglu_scan(
            q, k, v, gates.alpha, gates.eta if config.has_momentum else None, gates.theta,
            (self.w_gate[heads], self.w_up[heads], self.w_down[heads]), muon=config.swiglu.muon, state=state,
            segment_ids=segment_ids, chunk=config.swiglu.gradient_chunk,
        )  # fmt: skip

    def recall(self, q: Tensor, state: State, heads: slice) -> Tensor:
        accumulate_dtype = state[0].dtype
        initial = (self.w_gate[heads], self.w_up[heads], self.w_down[heads])
        weights = Weights(
            *(w.to(accumulate_dtype) + part for w, part in zip(initial, state[0].chunk(3, dim=-2), strict=True))
        )
        return apply_swiglu(q.to(accumulate_dtype).movedim(2, 1), weights).movedim(1, 2)


RULES: dict[str, type[MemoryRule]] = {
    "titans": ExactRule,
    "delta": ExactRule,
    "moneta": MonetaRule,
    "yaad": YaadRule,
    "memora": MemoraRule,
    "mlp": MlpRule,
    "swiglu": SwigluRule,
}


def memory_rule(config: MemoryConfig) -> MemoryRule:
    """The rule that the config names."""
    return RULES[config.rule](config)


def memory_backend(config: MemoryConfig, device_type: str, dtype: torch.dtype) -> str:
    """The scan's backend by name. Raises UserError when the one that was asked for cannot do it."""
    if config.chunk_start is not None or config.backend == "torch":
        return "torch"
    device = f"cuda:{torch.cuda.current_device()}" if device_type == "cuda" else device_type
    if config.backend == "auto" and dtype == torch.float16:
        dtype = torch.float32  # what `miras_scan` hands to a kernel
    taken = dtype in scan_native.DTYPES and config.head_dim in scan_native.KEY_DIMS
    if config.backend == "auto":
        return device_type if taken and scan_native.fits(device, dtype, config.head_dim) else "torch"
    flag = f"--model.memory.backend {config.backend}"
    if config.backend != device_type:
        raise UserError(f"{flag}: this run is on a {device_type} device: give auto or torch")
    if not taken:
        raise UserError(
            f"{flag} takes heads of {', '.join(map(str, scan_native.KEY_DIMS))} in float32 or bfloat16, not"
            f" --model.memory.head-dim {config.head_dim} in {dtype_name(dtype)}: give auto or torch"
        )
    reason = scan_native.why_not(device, dtype, config.head_dim)
    if reason is not None:
        raise UserError(f"{flag} cannot run: {reason}: give auto or torch")
    return config.backend
