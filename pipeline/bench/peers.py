"""Other people's packages that `bench kernels` measures in the same run, when they are installed.

A peer is given the tensors of `miras_scan` and does what comes closest. None computes the same function:

- **titans-pytorch** takes every gradient at the weights before the first token, its default, or (``/64``) at those
  before the token's chunk; neither is the current memory. A token reads the memory of the chunk before, and momentum
  and forgetting are shared within a chunk. It is given a linear memory that starts at zero and is not learned, chunks
  of 64, and q, k, v and gates from outside: no projections, norms or output layer of its own are timed.
- **flash-linear-attention**'s gated delta rule (on a GPU) is exact, with forgetting and without momentum.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.bench.kernel_ops import CHUNK

Run = tuple[Callable[[], Tensor], list[Tensor]]
"""What to call, and the leaves that it is differentiated by."""


@dataclass(frozen=True)
class Peer:
    """A package, and how to do with it what an op does."""

    name: str
    package: str
    module: str
    op: str
    devices: tuple[str, ...]
    prepare: Callable[[Sequence[Tensor]], Run]
    """From the op's inputs; raises ValueError where the peer does not take them."""

    @property
    def version(self) -> str | None:
        """Of the package; None where it is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


class Given(nn.Module):
    """Stands where a layer would compute a gate from tokens: hands out a gate that was given, part after part."""

    def __init__(self, gate: Tensor, dim: int) -> None:
        super().__init__()
        self.gate, self.dim, self.at = gate, dim, 0

    def forward(self, tokens: Tensor) -> Tensor:
        part = self.gate.narrow(self.dim, self.at, tokens.shape[1])
        self.at = (self.at + tokens.shape[1]) % self.gate.shape[self.dim]
        return part


def _half_square(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (prediction - target).square().sum(dim=-1)


def titans(x: Sequence[Tensor], batch_size: int | None, chunk: int = CHUNK) -> Run:
    """NeuralMemory of titans-pytorch as a linear memory with momentum that starts at zero, and given gates.

    ``batch_size``: tokens after which gradients are taken at new weights, a multiple of the chunk; None: never.
    """
    from titans_pytorch import NeuralMemory

    q, k, v, alpha, eta, theta = x
    batch, tokens, heads, dim = q.shape
    if tokens % chunk:
        raise ValueError(f"takes multiples of {chunk} tokens")
    memory = NeuralMemory(
        dim=heads * dim, dim_head=dim, heads=heads, chunk_size=chunk, batch_size=batch_size, momentum=True,
        pre_rmsnorm=False, mem_model_norm_add_residual=False, qkv_receives_diff_views=True,
        store_memory_loss_fn=_half_square, adaptive_step_transform=nn.Identity(), default_model_kwargs={"depth": 1},
    )  # fmt: skip
    memory.to(q.device, q.dtype)
    for name in ("to_queries", "to_keys", "to_values", "combine_heads"):
        setattr(memory, name, nn.Identity())
    memory.retrieve_gate = None
    with torch.no_grad():
        for weight in memory.memory_model_parameters:
            weight.zero_().requires_grad_(False)

    def flat(gate: Tensor) -> Tensor:
        return gate.detach().permute(0, 2, 1).reshape(batch * heads, tokens)

    def pooled(gate: Tensor) -> Tensor:
        # It shares momentum and forgetting within a chunk, and takes their logits.
        mean = flat(gate).unflatten(-1, (-1, chunk)).mean(dim=-1, keepdim=True)
        return mean.clamp(1e-6, 1 - 1e-6).logit()

    step = flat(theta).requires_grad_()
    forget, momentum = pooled(alpha).requires_grad_(), pooled(eta).unsqueeze(0).requires_grad_()
    memory.to_adaptive_step, memory.to_decay_factor = Given(step, dim=1), Given(forget, dim=1)
    memory.to_momentum = Given(momentum, dim=2)
    rows = [z.detach().flatten(2).requires_grad_() for z in (q, k, v)]

    def run() -> Tensor:
        return memory(torch.stack(rows))[0]

    return run, [*rows, step, forget, momentum]


def gated_delta_rule(x: Sequence[Tensor]) -> Run:
    """flash-linear-attention's chunk_gated_delta_rule, its forgetting in log space."""
    if x[0].dtype == torch.float32:
        raise ValueError("takes bfloat16 alone")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (z.detach().requires_grad_() for z in x[:3])
    decay, beta = torch.log1p(-x[3].detach()).requires_grad_(), x[5].detach().to(q.dtype).requires_grad_()

    def run() -> Tensor:
        return chunk_gated_delta_rule(q, k, v, decay, beta, scale=1.0, output_final_state=True)[0]

    return run, [q, k, v, decay, beta]


_TITANS = {"package": "titans-pytorch", "module": "titans_pytorch", "op": "miras_scan", "devices": ("cpu", "cuda")}
PEERS = (
    Peer(name="titans-pytorch", prepare=lambda x: titans(x, None), **_TITANS),  # type: ignore[arg-type]
    Peer(name="titans-pytorch/64", prepare=lambda x: titans(x, CHUNK), **_TITANS),  # type: ignore[arg-type]
    Peer("fla-gated-delta", "flash-linear-attention", "fla", "miras_scan", ("cuda",), gated_delta_rule),
)
