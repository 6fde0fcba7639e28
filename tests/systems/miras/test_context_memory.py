"""The memory as context of attention, against a loop over tokens that was written from the equations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.parallel.topology import Topology
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.context_memory import ContextBranch, ContextTokens
from pipeline.systems.miras.memory import MemoryCarry
from pipeline.systems.miras.segments import plan_segments

WIDTH, HEADS, DIM, ATTENTION = 12, 2, 4, 6


class TestMemoryAsContext:
    """The core, against a loop over tokens that was written from the equations."""

    def make(self, **changes: object) -> tuple[ContextBranch, MemoryConfig]:
        options = {"heads": HEADS, "head_dim": DIM, "persistent": 3, "chunk": 4, "context": 5, **changes}
        config = MemoryConfig(layers=(0,), attachment="mac", **options)  # type: ignore[arg-type]
        branch = ContextBranch(WIDTH, ATTENTION, config, norm_eps=1e-6)
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.7)
        return branch.double(), config

    def inputs(self, length: int, seed: int = 1) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(seed)
        hidden = torch.randn(2, length, WIDTH, generator=rng, dtype=torch.float64)
        return hidden, *torch.randn(3, 2, length, HEADS, ATTENTION, generator=rng, dtype=torch.float64).unbind(0)

    def layout(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return segments.expand(2, -1), torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)

    def run(
        self, branch: ContextBranch, config: MemoryConfig, inputs: tuple[Tensor, ...], layout: tuple[Tensor, Tensor],
        carry: MemoryCarry | None = None,
    ) -> tuple[Tensor, MemoryCarry]:  # fmt: skip
        hidden, q, v, attended = inputs
        segments, positions = layout
        ids = None if carry is None else carry.tail_segments
        grain = config.chunk_start or 1
        plan = plan_segments(segments, positions, ids, length=config.context, taps=config.conv, grain=grain)
        tokens: ContextTokens = branch.inputs(hidden)
        out, carry, _ = branch.core(tokens, q, v, attended, segments, plan, carry, Topology(), 0.4)
        return out, carry

    def expected(self, branch: ContextBranch, config: MemoryConfig, inputs: tuple[Tensor, ...]) -> Tensor:
        """One document, token after token, row after row and head after head."""
        hidden, q, v, attended = inputs
        core, source = branch.core, branch.inputs
        normed = F.rms_norm(hidden, (WIDTH,), source.norm.weight, 1e-6)
        queries = (normed @ source.q_proj.weight.T).unflatten(-1, (HEADS, DIM))
        logits = [normed @ gate.weight.T + gate.bias for gate in (source.alpha_proj, source.beta_proj)]
        weight = torch.tanh(normed @ source.context_gate.weight.T + source.context_gate.bias)
        result = []
        for row in range(hidden.shape[0]):
            for head in range(HEADS):
                only = [x[row, :, head] for x in (queries, q, v, attended, *logits, weight)]
                result.append(self.one_head(core, config, head, *only))
        return torch.stack(result).unflatten(0, (-1, HEADS)).movedim(1, 2)

    def one_head(
        self, core: nn.Module, config: MemoryConfig, head: int, queries: Tensor, q: Tensor, v: Tensor,
        attended: Tensor, alphas: Tensor, betas: Tensor, weights: Tensor,
    ) -> Tensor:  # fmt: skip
        def norm(x: Tensor) -> Tensor:
            return x / (x.square().mean() + 1e-6).sqrt()

        def mix(history: list[Tensor], kernel: Tensor) -> Tensor:
            """The last taps of a history, as far as there are any, through the convolution and SiLU."""
            recent = history[-config.conv :]
            return F.silu(sum(x * w for x, w in zip(recent, kernel[-len(recent) :], strict=True)))

        kernel = core.conv[head]
        memory = momentum = torch.zeros(DIM, DIM, dtype=torch.float64)
        asked: list[Tensor] = []
        written: list[Tensor] = []
        outs = []
        for t in range(q.shape[0]):
            if t % config.context == 0:
                found, keys, values = memory, [*core.persistent_k[head]], [*core.persistent_v[head]]
            asked.append(queries[t])
            read = norm(F.normalize(mix(asked, kernel[:, :DIM]), dim=0) @ found) * core.context_norm[head]
            key, value = (core.context_kv[head] @ read).chunk(2)
            keys.append(key)
            values.append(value)
            scores = torch.softmax(torch.stack(keys) @ q[t] * 0.4, dim=0)
            y = attended[t] + weights[t] * (scores @ torch.stack(values) - attended[t])

            written.append(core.write[head] @ torch.cat([norm(y), norm(v[t])]))
            ask, key, value = mix(written, kernel[:, DIM:]).chunk(3)
            ask, key = F.normalize(ask, dim=0), F.normalize(key, dim=0)
            eta = 0.99 * torch.sigmoid(core.eta_logits[head]) if config.rule == "titans" else 0.0
            theta = 0.9 * torch.sigmoid(betas[t]) * (1 - eta) ** 2
            momentum = eta * momentum - theta * torch.outer(key, key @ memory - value)
            memory = (1 - 0.01 * torch.sigmoid(alphas[t])) * memory + momentum
            gate = core.out_gate[head] @ (norm(ask @ memory) * core.head_norm[head])
            outs.append(y * 2 * torch.sigmoid(gate))
        return torch.stack(outs)

    @pytest.mark.parametrize("rule", ["titans", "delta"])
    @pytest.mark.parametrize("context", [1, 5, 7, 13])
    def test_it_is_the_loop_over_tokens(self, context: int, rule: str) -> None:
        """Values, and the gradients of every input and parameter."""
        branch, config = self.make(context=context, rule=rule)
        lengths = [11, 2, 4, 14]
        inputs = tuple(x.requires_grad_() for x in self.inputs(sum(lengths)))
        out, _ = self.run(branch, config, inputs, self.layout(lengths))
        pieces = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
        expected = torch.cat([self.expected(branch, config, piece) for piece in pieces], dim=1)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        wanted = {**dict(zip("hqva", inputs, strict=True)), **dict(branch.named_parameters())}
        actual, truth = (torch.autograd.grad(x, [*wanted.values()], cotangent) for x in (out, expected))
        for name, gradient, reference in zip(wanted, actual, truth, strict=True):
            assert reference.any(), name
            torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-9, msg=name)

    def test_rows_with_other_documents_are_strangers(self) -> None:
        branch, config = self.make()
        inputs = self.inputs(30)
        layouts = [self.layout(lengths) for lengths in ([30], [4, 26])]
        layout = tuple(torch.stack([a[0], b[0]]) for a, b in zip(*layouts, strict=True))
        together, carry = self.run(branch, config, inputs, layout)
        for row in range(2):
            only = tuple(x[row : row + 1] for x in inputs)
            alone, own = self.run(branch, config, only, tuple(x[row : row + 1] for x in layout))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-11, atol=1e-12)
            for name, mine in zip(own._fields, own, strict=True):
                torch.testing.assert_close(getattr(carry, name)[row : row + 1], mine, rtol=1e-11, atol=1e-12)

    def test_a_stream_may_begin_within_a_document(self) -> None:
        """Its first segment is short, and the same however the stream is split."""
        branch, config = self.make()
        inputs = self.inputs(20)
        segments, positions = (x[:, 3:] for x in self.layout([23]))
        whole, last = self.run(branch, config, inputs, (segments, positions))
        for place in (1, 2, 4, 9, 17):
            carry, found = None, []
            for part in (slice(0, place), slice(place, 20)):
                layout = (segments[:, part], positions[:, part])
                out, carry = self.run(branch, config, tuple(x[:, part] for x in inputs), layout, carry)
                found.append(out)
            torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(carry.memory, last.memory, rtol=1e-9, atol=1e-10)

    def test_what_lies_before_the_segment_is_read_through_the_context(self) -> None:
        """With the output gate silenced, the memory's way to a token is the context alone."""
        branch, config = self.make()
        with torch.no_grad():
            branch.core.out_gate.zero_()
        hidden, q, v, attended = self.inputs(20)
        changed = attended.clone()
        changed[:, 1] += 1
        layout = self.layout([20])
        before, after = (self.run(branch, config, (hidden, q, v, x), layout)[0] for x in (attended, changed))
        change = (after - before).abs().amax(dim=(0, 2, 3))
        assert not change[0].any() and not change[2 : config.context].any()
        assert (change[config.context :] > 1e-6).all()

    def test_the_carry_is_small_and_in_single_precision(self) -> None:
        branch, config = self.make()
        branch.bfloat16()
        inputs = tuple(x.bfloat16() for x in self.inputs(30))
        out, carry = self.run(branch, config, inputs, self.layout([30]))
        reach = config.context + config.conv - 2
        assert out.dtype == torch.bfloat16
        assert carry.memory.dtype == carry.momentum.dtype == carry.tail.dtype == torch.float32
        assert carry.tail.shape == (2, reach, HEADS, 4 * DIM + 2) and carry.tail_segments.shape == (2, reach)
