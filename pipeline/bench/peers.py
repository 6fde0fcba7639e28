"""Other people's packages that `bench kernels` measures in the same run, when they are installed.

A peer is given the tensors of `miras_scan` and does what comes closest:

- **fla-core**'s momentum delta rule computes the same function, in chunks (MDN, arXiv 2605.05838). In 0.6.0 it is
  PyTorch, on any device, and it takes no packed documents.
- **fla-core**'s gated delta rule (on a GPU) is exact, with forgetting and without momentum.
- **titans-pytorch** takes every gradient at the weights before the first token, its default, or (``/64``) at those
  before the token's chunk; neither is the current memory. A token reads the memory of the chunk before, and momentum
  and forgetting are shared within a chunk. It is given a linear memory that starts at zero and is not learned, chunks
  of 64, and q, k, v and gates from outside: no projections, norms or output layer of its own are timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from pipeline.bench.kernel_ops import CHUNK


@dataclass(frozen=True)
class Run:
    """What to call, and by what it is differentiated."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    implementation: str | None = None
    """The function that a peer was found to have, where it has more than one."""


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
    exact: bool = False
    """Whether it computes the op's own function. Then the leaves of its runs are the op's inputs, in their order."""

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

    return Run(run, [*rows, step, forget, momentum])


def gated_delta_rule(x: Sequence[Tensor]) -> Run:
    """fla-core's chunk_gated_delta_rule, its forgetting in log space."""
    if x[0].dtype == torch.float32:
        raise ValueError("takes bfloat16 alone")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (z.detach().requires_grad_() for z in x[:3])
    decay, beta = torch.log1p(-x[3].detach()).requires_grad_(), x[5].detach().to(q.dtype).requires_grad_()

    def run() -> Tensor:
        return chunk_gated_delta_rule(q, k, v, decay, beta, scale=1.0, output_final_state=True)[0]

    return Run(run, [q, k, v, decay, beta])


def fla_file(name: str) -> ModuleType:
    """One file of fla-core as a module, such as ``ops/momentum_delta_rule/naive.py``.

    Its packages are not imported: they need Triton. Raises ImportError where there is no such file.
    """
    package = importlib.util.find_spec("fla")
    folders = (package and package.submodule_search_locations) or []
    path = next((path for folder in folders if (path := Path(folder) / name).is_file()), None)
    if path is None:
        raise ImportError(f"there is no fla-core with {name}: install fla-core 0.6.0 or newer")
    spec = importlib.util.spec_from_file_location(f"fla_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _momentum_rule(device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., tuple[Tensor, object]], str]:
    """fla-core's chunked momentum delta rule for these tensors, and which one that is.

    On a GPU, in bfloat16, its public op, with whatever that runs on. The op refuses float32 and cannot be imported
    without Triton, so elsewhere it is the PyTorch function in the package that the op of 0.6.0 calls itself.
    """
    if device.type == "cuda" and dtype != torch.float32:
        from fla.ops import momentum_delta_rule as package

        sources = Path(package.__path__[0]).glob("*.py")
        written = "Triton" if any("import triton" in path.read_text() for path in sources) else "PyTorch"
        op = package.chunk_momentum_delta_rule
        rule = partial(op, use_qk_l2norm_in_kernel=False, use_p_times_alpha=False)
        return rule, f"{op.__name__}, {written}"
    op = fla_file("ops/momentum_delta_rule/naive.py").chunk_momentum_delta_rule_ref
    return op, f"{op.__name__}, PyTorch"


def momentum_delta_rule(x: Sequence[Tensor], chunk: int = CHUNK) -> Run:
    """fla-core's chunked momentum delta rule as the rule of `miras_scan`.

    The residual is read at the memory as it was (its p is k), a step size of theta (its eta), momentum eta (its mu), no
    write gate (its beta is 1, to which it adds 1e-6); forgetting and momentum in log space, where 0 is not finite.
    Its momentum has the other sign, which shows in its state alone. ``chunk``: 16, 32 or 64 tokens.
    """
    q, k, v, alpha, eta, theta = x
    rule, implementation = _momentum_rule(q.device, q.dtype)

    def run() -> Tensor:
        y, _ = rule(
            q=q, k=k, v=v, p=k, log_alpha=torch.log1p(-alpha), log_mu=eta.log(), beta=torch.ones_like(theta),
            eta=theta, scale=1.0, chunk_size=chunk,
        )  # fmt: skip
        return y.to(v.dtype)

    return Run(run, list(x), implementation)


_titans = partial(Peer, package="titans-pytorch", module="titans_pytorch", op="miras_scan", devices=("cpu", "cuda"))
_fla = partial(Peer, package="fla-core", module="fla", op="miras_scan")
PEERS = (
    _titans("titans-pytorch", prepare=partial(titans, batch_size=None)),
    _titans("titans-pytorch/64", prepare=partial(titans, batch_size=CHUNK)),
    _fla("fla-momentum", devices=("cpu", "cuda"), prepare=momentum_delta_rule, exact=True),
    _fla("fla-momentum/16", devices=("cpu", "cuda"), prepare=partial(momentum_delta_rule, chunk=16), exact=True),
    _fla("fla-gated-delta", devices=("cuda",), prepare=gated_delta_rule),
)
