"""A peer is given the tensors of the memory op, means the same by them, and is asked for nothing of its own."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.bench import peers
from pipeline.bench.contenders import relative_error
from pipeline.bench.kernel_ops import CHUNK, Op, Shape, memory_inputs, ops
from tests.ops.fla_oracle import needs_fla_core

CPU = torch.device("cpu")


class NeuralMemory(nn.Module):
    """Asks its layers for gates as the package's class does; what it computes is the memory's last write."""

    seen: dict = {}

    def __init__(self, **options) -> None:
        super().__init__()
        NeuralMemory.seen = options
        dim = options["dim"]
        self.to_queries = self.to_keys = self.to_values = nn.Linear(dim, dim)
        self.combine_heads = nn.Linear(dim, dim)
        self.memory_model_parameters = nn.ParameterList([nn.Parameter(torch.ones(2, 16, 16))])

    def forward(self, qkv: Tensor) -> tuple[Tensor, None]:
        q, k, v = (layer(x) for layer, x in zip((self.to_queries, self.to_keys, self.to_values), qkv, strict=True))
        chunked = k.unflatten(1, (-1, CHUNK)).mean(dim=2)
        gates = [self.to_adaptive_step(k), self.to_decay_factor(chunked), self.to_momentum(chunked)]
        assert [tuple(gate.shape) for gate in gates] == [(2, 128), (2, 2, 1), (1, 2, 2, 1)]
        assert not any(weight.any() or weight.requires_grad for weight in self.memory_model_parameters)
        return self.combine_heads(q * k * v) * sum(gate.sum() for gate in gates), None


def test_titans_is_given_the_same_tensors_and_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "titans_pytorch", types.SimpleNamespace(NeuralMemory=NeuralMemory))
    inputs = memory_inputs(Shape(1, 128, 2, 16), torch.float32, CPU)
    run = peers.titans(inputs, None)
    y, leaves = run.forward(), run.leaves
    q, k, v, alpha, eta, theta = inputs
    step, forget, momentum = leaves[3:]
    assert torch.equal(step, theta[0].T)
    pooled = [gate[0].T.unflatten(1, (2, CHUNK)).mean(dim=-1) for gate in (alpha, eta)]
    torch.testing.assert_close([forget.sigmoid()[..., 0], momentum.sigmoid()[0, ..., 0]], pooled)
    expected = (q * k * v).flatten(2) * sum(gate.sum() for gate in leaves[3:])
    torch.testing.assert_close(y, expected)
    assert NeuralMemory.seen["chunk_size"] == CHUNK and NeuralMemory.seen["default_model_kwargs"] == {"depth": 1}
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(gradient.any() for gradient in gradients)
    with pytest.raises(ValueError, match="takes multiples of 64 tokens"):
        peers.titans(memory_inputs(Shape(1, 100, 2, 16), torch.float32, CPU), None)


def test_given_gates_are_handed_out_part_after_part() -> None:
    gate = torch.arange(12.0).view(2, 6)
    layer = peers.Given(gate, dim=1)
    for _ in range(2):
        parts = [layer(torch.zeros(1, length, 3)) for length in (4, 2)]
        assert torch.equal(torch.cat(parts, dim=1), gate)


def test_the_gated_delta_rule_is_given_forgetting_in_log_space(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}

    def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options):
        seen.update(options, g=g, beta=beta)
        return q * k * v * (g.exp() * beta).unsqueeze(-1), None

    module = types.SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    inputs = memory_inputs(Shape(1, 20, 2, 16), torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="takes bfloat16 alone"):
        peers.gated_delta_rule(memory_inputs(Shape(1, 20, 2, 16), torch.float32, CPU))
    run = peers.gated_delta_rule(inputs)
    y = run.forward()
    torch.testing.assert_close(seen["g"].exp(), 1 - inputs[3])
    assert seen["g"].dtype == torch.float32 and seen["beta"].dtype == torch.bfloat16 and seen["scale"] == 1.0
    assert all(x.any() for x in torch.autograd.grad(y.sum(), run.leaves))


def with_momentum(momentum: float) -> Op:
    """The memory op on the bench's tensors, but for the momentum and the step size that goes with it."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        x = [z.detach() for z in memory_inputs(shape, dtype, device)]
        x[5] = x[5] * ((1 - momentum) / (1 - x[4])) ** 2
        x[4] = torch.full_like(x[4], momentum)
        return [z.requires_grad_() for z in x]

    return Op("miras_scan", ("torch",), inputs, ops()["miras_scan"].call, None)


@needs_fla_core
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_the_momentum_rule_is_the_ops_where_it_keeps_its_digits(momentum: float) -> None:
    """It divides by the product of a chunk's momentum, which leaves float32 with fewer digits the smaller it is."""
    op, shape = with_momentum(momentum), Shape(1, 200, 2, 32)
    errors = {name: relative_error(op, name, shape, torch.float32, CPU)
              for name in ("torch", "fla-momentum", "fla-momentum/16")}  # fmt: skip
    print(f"momentum {momentum}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert errors["torch"] < 2e-6
    if momentum >= 0.95:
        assert max(errors.values()) < 5e-6


@needs_fla_core
def test_on_a_cpu_the_momentum_rule_is_read_from_its_file_alone() -> None:
    loaded = {name for name in sys.modules if name.partition(".")[0] == "fla"}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = with_momentum(0.95).inputs(Shape(1, 70, 2, 32), dtype, CPU)
        run = peers.momentum_delta_rule(inputs)
        y = run.forward()
        assert y.dtype == dtype and run.leaves == inputs
        assert run.implementation == "chunk_momentum_delta_rule_ref, PyTorch"
    assert {name for name in sys.modules if name.partition(".")[0] == "fla"} == loaded


@pytest.mark.parametrize(("source", "written"), [("import torch", "PyTorch"), ("import triton", "Triton")])
def test_on_a_gpu_the_momentum_rule_is_the_packages_op(
    source: str, written: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict = {}

    def chunk_momentum_delta_rule(**options):
        seen.update(options)

    package = types.ModuleType("fla.ops.momentum_delta_rule")
    package.__path__ = [str(tmp_path)]
    package.chunk_momentum_delta_rule = chunk_momentum_delta_rule
    (tmp_path / "chunk.py").write_text(source)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops"].momentum_delta_rule = package
    rule, implementation = peers._momentum_rule(torch.device("cuda"), torch.bfloat16)
    assert implementation == f"chunk_momentum_delta_rule, {written}"
    rule(chunk_size=64)
    assert seen == {"use_qk_l2norm_in_kernel": False, "use_p_times_alpha": False, "chunk_size": 64}


def test_a_missing_file_of_fla_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"there is no fla-core with ops/x\.py: install fla-core 0.6.0 or newer"):
        peers.fla_file("ops/x.py")
