"""The memory of a training step, traced: the model runs on tensors that have sizes and no storage.

What a GPU would run in one kernel (FlexAttention, the merge with the sinks, rotations, RMS norms, the softmax of the
loss) is stood in for by functions that keep and make what those kernels do. All else is the model's own code.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import RunConfig
from pipeline.data.batch import TokenBatch
from pipeline.lm import attention
from pipeline.lm.distillation import places
from pipeline.ops import (
    attention_flex,
    attention_slots,
    attention_slots_flex,
    chunks,
    cross_entropy,
    dual_scan,
    scan_native,
)
from pipeline.parallel.topology import Topology
from pipeline.system import Carry, StepContext, create_system
from pipeline.systems.miras import model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def stand_in(kept: Callable[..., tuple], made: Callable[..., Any], gradients: int) -> Callable[..., Any]:
    """A differentiable function that keeps `kept(result, *arguments)`, returns `made(*arguments)`, and whose backward
    pass makes a gradient like each of its first arguments."""

    class StandIn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            result = made(*arguments)
            ctx.save_for_backward(*kept(result, *arguments))
            ctx.arguments = [(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in arguments]
            return result

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            _ = ctx.saved_tensors
            like = [None if x is None else upstream[0].new_empty(x[0], dtype=x[1]) for x in ctx.arguments[:gradients]]
            return *like, *[None] * (len(ctx.arguments) - gradients)

    return StandIn.apply


_rotate = stand_in(lambda y, x, cos, sin: (cos, sin), lambda x, cos, sin: torch.empty_like(x), 1)
_norm = stand_in(lambda y, x, weight, rstd: (x, weight, rstd), lambda x, weight, rstd: torch.empty_like(x), 2)
_flex = stand_in(
    lambda out, q, k, v, bias: (q, k, v, *out, bias),
    lambda q, k, v, bias: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    3,
)
# Of one part or two: outputs, log-sum-exps, queries, sinks.
_merges = {parts: stand_in(lambda y, *x: x, lambda out, *_: torch.empty_like(out), 2 * parts + 3) for parts in (1, 2)}
_turn_slots = stand_in(lambda y, keys, ages: (ages,), lambda keys, ages: torch.empty_like(keys), 1)


def traced_step(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, degree: int = 1, natively: bool = True
) -> tuple[int, Carry]:
    """The most bytes that one rank holds in forward and backward beside weights and gradients, new carry included, and
    that carry. The scratch memory of native kernels is not seen."""
    _act_like_a_gpu(monkeypatch, degree, natively)
    topology = Topology(world=degree, sequence=degree)
    system = create_system(config)
    system.check(topology)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    shape = (config.batch_size, config.sequence_length)
    with FakeTensorMode(), LiveBytes() as memory:
        torch.set_default_dtype(dtype)
        try:
            model = system.build()
        finally:
            torch.set_default_dtype(torch.float32)
        trained = {name for phase in system.phases(model) for group in phase.groups for name in group.parameters}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained:
                # ZeRO takes every gradient as soon as it is complete.
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        before = memory.peak = memory.live
        batch = TokenBatch(
            *(torch.zeros(shape, dtype=torch.int64) for _ in range(4)), torch.zeros(shape[0], dtype=torch.int64)
        )
        output = system.forward(model, batch, {}, StepContext(topology, 0, "train", 1))
        carry = {name: dataclasses.replace(entry, tensor=entry.tensor.detach()) for name, entry in output.carry.items()}
        loss = torch.stack([value.float() for value in output.sums.values()]).sum()
        del output
        loss.backward()
        return memory.peak - before, carry


def _act_like_a_gpu(monkeypatch: pytest.MonkeyPatch, degree: int, natively: bool) -> None:
    monkeypatch.setattr(attention, "attention_backend", lambda *_: "flex")
    monkeypatch.setattr(attention_flex, "rotate", lambda x, rotation: _rotate(x, *rotation))
    monkeypatch.setattr(attention_flex, "_fused_flex", lambda q, k, v, mask, scale, bias: _flex(q, k, v, bias))

    def merge(outs: list[Tensor], sums: list[Tensor], q: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Any:
        return _merges[len(outs)](*outs, *sums, q, *rest[:2])

    monkeypatch.setattr(attention_flex, "_merge", merge)
    for module in (attention_slots, attention_slots_flex):
        monkeypatch.setattr(module, "rotate", lambda x, rotation: _rotate(x, *rotation))
    monkeypatch.setattr(attention_slots, "turn_slots", lambda keys, place, back, ages: _turn_slots(keys, ages))

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return _norm(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))

    def softmax(logits: Tensor, labels: Tensor, ignored: int, z_loss: float) -> tuple[Tensor, None, Tensor]:
        return logits.new_empty(labels.shape, dtype=torch.float32), None, torch.empty_like(logits)

    monkeypatch.setattr(cross_entropy, "_losses_and_gradient", softmax)
    monkeypatch.setattr(F, "rms_norm", rms_norm)
    monkeypatch.setattr(model, "places", functools.partial(places, fixed=True))
    monkeypatch.setattr(scan_native, "fits", lambda *_: natively)
    if natively:
        scan_native._register()
    monkeypatch.setattr(chunks, "SPAN_CPU", chunks.SPAN_GPU)
    monkeypatch.setattr(dual_scan, "_BLOCK_CPU", dual_scan._BLOCK_GPU)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: degree)
    monkeypatch.setattr(dist, "all_to_all_single", lambda received, sent, group=None: received.copy_(sent))
    # On a CPU the plan asks whether any sink is visible.
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: True, raising=False)
