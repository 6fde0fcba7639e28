"""Every rule of the family: one interface, zeros that read as zero, heads apart, and memories that learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ops import scan_native
from pipeline.ops.gates import STEP_MARGIN
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import generator_for
from pipeline.recipes.miras import miras_recall
from pipeline.system import Evaluation, System, create_system
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.initial_values import initial_value
from pipeline.systems.miras.limits import largest_step
from pipeline.systems.miras.memory import MemoryBranch, MemoryCarry
from pipeline.systems.miras.rule_config import MemoraConfig, MlpConfig, MonetaConfig, SwigluConfig, YaadConfig
from pipeline.systems.miras.rules import RULES, MemoryRule, memory_backend, memory_rule

HEADS, DIM, CHUNK = 3, 4, 8
MOMENTUM = {"moneta": MonetaConfig, "yaad": YaadConfig, "memora": MemoraConfig, "mlp": MlpConfig}
every_rule = pytest.mark.parametrize("rule", RULES)


def settings(rule: str, **changes: object) -> MemoryConfig:
    options = {
        "layers": (0,), "heads": HEADS, "head_dim": DIM, "persistent": 0, "gate_rank": 5, "chunk": CHUNK,
        "gradient_chunk": CHUNK, "swiglu": SwigluConfig(gradient_chunk=CHUNK), **changes,
    }  # fmt: skip
    return MemoryConfig(rule=rule, **options)  # type: ignore[arg-type]


def make(rule: str, **changes: object) -> MemoryRule:
    made = memory_rule(settings(rule, **changes)).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.7)
    return made


def tokens(length: int = 21, seed: int = 1) -> list[Tensor]:
    """q, k, v, the logits of alpha and beta for two rows."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(2, length, HEADS, DIM), dim=-1) for _ in range(2))
    return [q, k, normal(2, length, HEADS, DIM), normal(2, length, HEADS), normal(2, length, HEADS)]


def momentum_of(rule: MemoryRule) -> Tensor | None:
    return torch.linspace(-1, 1, HEADS, dtype=torch.float64) if rule.config.has_momentum else None


ALL = slice(0, HEADS)


@every_rule
def test_an_empty_memory_reads_as_zero_and_its_state_is_zeros(rule: str) -> None:
    made, (q, *_) = make(rule), tokens()
    state = made.empty_state(2, ALL, q)
    assert [part.shape for part in state] == [(2, HEADS, made.config.state_rows, DIM)] * 2
    assert not any(part.any() for part in state)
    assert made.read(q, state, ALL).abs().max() < 1e-12
    assert made.empty_state(2, ALL, q.bfloat16())[0].dtype == torch.float32


@every_rule
def test_without_steps_a_pass_reads_the_state_as_it_is(rule: str) -> None:
    made, (q, k, v, alpha, beta) = make(rule), tokens()
    _, (state, _), _ = made(q, k, v, alpha, beta, momentum_of(made), made.empty_state(2, ALL, q), None, ALL)
    still = torch.full_like(alpha, -1e3)
    rest = (state, torch.zeros_like(state))
    y, after, gates = made(q, k, v, still, still, momentum_of(made), rest, None, ALL)
    assert not gates.alpha.any()
    assert not gates.theta.any()
    torch.testing.assert_close(y, made.read(q, (state, state), ALL), rtol=1e-9, atol=1e-9)
    assert y.abs().max() > 1e-6
    torch.testing.assert_close(after[0], state, rtol=1e-9, atol=1e-9)


@every_rule
def test_heads_do_not_meet(rule: str) -> None:
    """A sequence rank holds a part of the heads: it computes what one rank computes for them, gradients included."""
    made, x = make(rule), tokens()
    ids = torch.tensor([[0] * 13 + [1] * 8, [0] * 21])
    inputs = [z.requires_grad_() for z in x]

    def outputs(heads: slice) -> list[Tensor]:
        part = [z[:, :, heads] for z in inputs]
        state = tuple(z[:, heads] for z in made.empty_state(2, ALL, x[0]))
        y, after, gates = made(*part, momentum_of(made), state, ids, heads)
        return [y, *(z.transpose(1, 2) for z in after), gates.alpha, gates.eta, gates.theta]

    whole = outputs(ALL)
    parts = [torch.cat(z, dim=2) for z in zip(outputs(slice(0, 1)), outputs(slice(1, 3)), strict=True)]
    leaves = [*inputs, *made.parameters()]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        *(torch.autograd.grad(z[0].square().sum() + z[1].square().sum(), leaves) for z in (whole, parts)), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert a.any()


@pytest.mark.parametrize("rule", MOMENTUM)
def test_momentum_can_be_had_or_not(rule: str) -> None:
    for momentum in (False, True):
        made, x = make(rule, **{rule: MOMENTUM[rule](momentum=momentum)}), tokens()
        assert made.config.has_momentum == momentum
        _, _, gates = made(*x, momentum_of(made), made.empty_state(2, ALL, x[0]), None, ALL)
        assert bool(gates.eta.any()) == momentum
        other = None if momentum else torch.zeros(HEADS)
        with pytest.raises(ValueError, match="momentum"):
            made(*x, other, made.empty_state(2, ALL, x[0]), None, ALL)


def initial(name: str, shape: torch.Size, memory: MemoryConfig) -> Tensor:
    """The initial value of a parameter of a model, by its name there."""
    return initial_value(name, shape, MirasConfig(memory=memory), generator_for(0, name))


@pytest.mark.parametrize("form", ["elementwise", "norm"])
def test_huber_thresholds_start_as_configured_and_follow_the_key(form: str) -> None:
    config = settings("yaad", yaad=YaadConfig(form=form, delta=0.3))
    made, (_, k, *_) = memory_rule(config), tokens()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial(f"memory.0.rule.{name}", parameter.shape, config))
    assert made.threshold(k, ALL).allclose(torch.tensor(0.3, dtype=torch.float64))
    with torch.no_grad():
        made.delta_weight.fill_(1.0)
    found = made.threshold(k, ALL)
    assert found.shape == k.shape[:3] and found.min() > 0 and found.std() > 0.01
    per_head = memory_rule(settings("yaad", yaad=YaadConfig(threshold="head")))
    assert [name for name, _ in per_head.named_parameters()] == ["delta_bias"]


@every_rule
def test_ranges_of_step_sizes(rule: str) -> None:
    """The sum over a chunk of a chunk-start rule stays in the range of one exact step; swiglu's follows its root."""
    step = largest_step(settings(rule))
    expected = {"titans": 1, "delta": 1, "swiglu": CHUNK**0.5}.get(rule, CHUNK)
    assert step == pytest.approx(STEP_MARGIN / expected)
    made, x = make(rule), tokens()
    x[4] = torch.full_like(x[4], 1e3)
    _, _, gates = made(*x, momentum_of(made), made.empty_state(2, ALL, x[0]), None, ALL)
    assert (gates.theta <= step * (1 - gates.eta) ** 2 * (1 + 1e-12)).all()


@every_rule
def test_a_repetitive_document_does_not_blow_the_memory_up(rule: str) -> None:
    """Eight tokens again and again, the largest steps, no forgetting: within bounds that do not depend on the data."""
    made = make(rule)
    x = [z[:, :8].repeat(1, 256, *([1] * (z.dim() - 2))) for z in tokens(8)]
    x[3], x[4] = torch.full_like(x[3], -50.0), torch.full_like(x[4], 50.0)
    eta = None if momentum_of(made) is None else torch.full((HEADS,), 2.2, dtype=torch.float64)
    norms = []
    for length in (512, 2048):
        part = [z[:, :length] for z in x]
        y, (memory, _), _ = made(*part, eta, made.empty_state(2, ALL, x[0]), None, ALL)
        assert y.isfinite().all()
        norms.append(float(memory.norm()))
    # Linear growth at worst, whatever happens to the error.
    assert norms[1] <= 4.4 * norms[0]


class TestBranch:
    """The rules inside of a branch, with convolution, gates and carry."""

    def make(self, rule: str) -> MemoryBranch:
        branch = MemoryBranch(12, settings(rule), norm_eps=1e-6)
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.7)
        return branch.double()

    def ids(self, *lengths: int) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1).contiguous()

    @every_rule
    @pytest.mark.parametrize("lengths", [(32,), (5, 27), (16, 16), (3, 9, 20)], ids=str)
    def test_steps_that_end_with_a_chunk_equal_one(self, lengths: tuple[int, ...], rule: str) -> None:
        branch, ids = self.make(rule), self.ids(*lengths)
        hidden = torch.randn(2, 32, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whole, last, _ = branch(hidden, ids, None, Topology())
        carry, steps = None, []
        for start, end in ((0, 8), (8, 24), (24, 32)):
            added, carry, _ = branch(hidden[:, start:end], ids[:, start:end], carry, Topology())
            steps.append(added)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-9, atol=1e-11)
        for field, expected in zip(MemoryCarry._fields, last, strict=True):
            torch.testing.assert_close(getattr(carry, field), expected, rtol=1e-9, atol=1e-11)

    @every_rule
    def test_documents_that_begin_with_a_chunk_equal_separate_runs(self, rule: str) -> None:
        branch, lengths = self.make(rule), (8, 16, 7)
        hidden = torch.randn(2, 31, 12, dtype=torch.float64).requires_grad_()
        packed, _, _ = branch(hidden, self.ids(*lengths), None, Topology())
        apart = [branch(part, self.ids(part.shape[1]), None, Topology())[0] for part in hidden.split(lengths, dim=1)]
        leaves = [hidden, *(parameter for parameter in branch.parameters() if parameter.numel())]
        torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-9, atol=1e-11)
        cotangent = torch.randn_like(packed)
        for a, b in zip(
            *(torch.autograd.grad(z, leaves, cotangent) for z in (packed, torch.cat(apart, 1))), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class TestConfig:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"rule": "yaad", "backend": "cpu"}, "--model.memory.backend cpu: the rule yaad has no native kernel"),
            ({"rule": "swiglu", "backend": "cuda"}, "--model.memory.backend cuda: the rule swiglu"),
            ({"gradient_chunk": 0}, "--model.memory.gradient-chunk is 0"),
        ],
    )
    def test_what_cannot_be_combined_is_refused(self, changes: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            MemoryConfig(**changes)

    @pytest.mark.parametrize(
        "section, changes, message",
        [
            (MonetaConfig, {"p": 1.5}, "moneta.p 1.5: give 2 or more"),
            (MonetaConfig, {"p": 0.5, "smooth": "sqrt"}, "moneta.p 0.5"),
            (MonetaConfig, {"q": 1.9}, "moneta.q 1.9: give 2 or more"),
            (MonetaConfig, {"clip": 0.0}, "moneta.clip 0.0"),
            (YaadConfig, {"delta": 0.0}, "yaad.delta 0.0"),
            (MemoraConfig, {"scale": -1.0}, "memora.scale -1.0"),
            (MlpConfig, {"hidden": 0}, "memory.mlp.hidden is 0"),
            (MlpConfig, {"clip": -1.0}, "mlp.clip -1.0"),
            (SwigluConfig, {"gradient_chunk": 0}, "memory.swiglu.gradient-chunk is 0"),
        ],
    )
    def test_sections_refuse_what_they_cannot_do(self, section: type, changes: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            section(**changes)

    def test_a_smooth_signal_takes_any_norm(self) -> None:
        assert MonetaConfig(p=1.0, smooth="tanh").p == 1.0


class TestSystem:
    def system(self, rule: str, **swiglu: int) -> System:
        config = miras_recall()
        memory = dataclasses.replace(config.model.memory, rule=rule, swiglu=SwigluConfig(**swiglu))
        return create_system(dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory)))

    def test_a_sequence_of_a_single_large_chunk_is_refused(self) -> None:
        self.system("swiglu", gradient_chunk=128).check(Topology())
        with pytest.raises(UserError, match=r"--model.memory.swiglu.gradient-chunk 256: .* --sequence-length 256"):
            self.system("swiglu", gradient_chunk=256).check(Topology())

    def test_the_log_says_where_gradients_are_taken(self) -> None:
        told = {rule: self.system(rule).describe("cpu", torch.float32)["memory"] for rule in ("delta", "yaad")}
        assert "chunk" not in told["delta"] and told["delta"].startswith("delta")
        assert told["yaad"].startswith("yaad with gradients by chunks of 16, residual; layers 0 and 1; 2 heads x 32; ")

    def test_it_speaks_in_words_of_its_own(self) -> None:
        system = self.system("delta")
        assert system.caption() == "window 32, delta on layers 0 and 1"
        evaluation = Evaluation({"loss": 1.0, "memory_off/loss": 2.0})
        assert system.headline(evaluation) == "val 1.000 | memory off 2.000 (+1.000)"
        assert system.health({"beyond_window": 0.5}) == "50 % beyond the window"

    @every_rule
    def test_every_parameter_has_an_initial_value_of_its_own_name(self, rule: str) -> None:
        system, first = self.system(rule, gradient_chunk=64), None
        for _ in range(2):
            model = system.build()
            system.initialise(model, Topology())
            found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            assert all(parameter.isfinite().all() for parameter in found.values())
            first = first or found
            assert all(torch.equal(parameter, first[name]) for name, parameter in found.items())


class TestBackend:
    def test_the_family_runs_on_torch(self) -> None:
        for rule in set(RULES) - {"titans", "delta"}:
            assert memory_backend(settings(rule), "cpu", torch.float32) == "torch"
        assert memory_backend(settings("titans", backend="torch", head_dim=64), "cpu", torch.float32) == "torch"
        assert memory_backend(settings("titans", head_dim=5), "cpu", torch.float32) == "torch"

    @pytest.mark.parametrize(
        "changes, dtype, message",
        [
            ({"backend": "cuda", "head_dim": 64}, torch.float32, "backend cuda: this run is on a cpu device"),
            ({"backend": "cpu", "head_dim": 48}, torch.float32, "--model.memory.head-dim 48 in float32"),
            ({"backend": "cpu", "head_dim": 64}, torch.float16, "in float16"),
        ],
    )
    def test_what_was_asked_for_and_cannot_be_is_refused(self, changes: dict, dtype: torch.dtype, message: str) -> None:
        with pytest.raises(UserError, match=message):
            memory_backend(settings("titans", **changes), "cpu", dtype)

    def test_a_native_scan_that_is_not_there_is_refused_in_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scan_native, "why_not", lambda *_: "it is not built")
        with pytest.raises(UserError, match="backend cpu cannot run: it is not built: give auto"):
            memory_backend(settings("titans", backend="cpu", head_dim=32), "cpu", torch.float32)
        monkeypatch.setattr(scan_native, "fits", lambda *_: True)
        assert memory_backend(settings("titans", head_dim=32), "cpu", torch.float32) == "cpu"


# Steps, rows and a rate that a rule needs on the task below. Values are signs, or one of eight where errors are cubed.
LEARN = {
    "titans": {},
    "delta": {},
    "moneta": {"steps": 400, "rate": 0.01, "signs": False},
    "yaad": {},
    "memora": {},
    "mlp": {"steps": 150, "rows": 64},
    "swiglu": {},
    "muon": {},
}


@pytest.mark.parametrize("name", LEARN)
def test_a_memory_learns_to_recall_values_by_their_keys(name: str) -> None:
    """Four of eight keys with random values, eight keys without, then the four keys in another order.

    Nothing but the memory reaches from a value to its query. What knows no value has an error of 1; what recalls the
    mean of the four, whatever the key, one of 0.75.
    """
    config = settings(
        "swiglu" if name == "muon" else name, heads=2, head_dim=16, gate_rank=8, step_size=(0.5, 0.1),
        mlp=MlpConfig(hidden=2), swiglu=SwigluConfig(gradient_chunk=CHUNK, muon=name == "muon"),
    )  # fmt: skip
    error = trained(config, **LEARN[name])
    assert error < 0.3


def trained(config: MemoryConfig, *, steps: int = 120, rows: int = 32, rate: float = 0.05, signs: bool = True) -> float:
    """Mean squared error over the last tenth of the training, over the variance of the values."""
    size, pairs, gap = 8, 4, 8
    branch = MemoryBranch(2 * size + 2, config, 1e-6)
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            parameter.copy_(initial(f"memory.0.{name}", parameter.shape, config))
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(branch.parameters(), lr=rate, betas=(0.9, 0.98))
    length, variance = 2 * pairs + gap, 1.0 if signs else 1 - 1 / size
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        keys = F.one_hot(torch.rand(rows, size, generator=rng).argsort(dim=1)[:, :pairs], size) * size**0.5
        if signs:
            values = torch.randn(rows, pairs, size, generator=rng).sign()
        else:
            values = F.one_hot(torch.randint(size, (rows, pairs), generator=rng), size) * size**0.5
        others = F.one_hot(torch.randint(size, (rows, gap), generator=rng), size) * size**0.5
        order = torch.rand(rows, pairs, generator=rng).argsort(dim=1)[..., None].expand(-1, -1, size)
        hidden = torch.zeros(rows, length, 2 * size + 2)
        hidden[:, :pairs, :size], hidden[:, :pairs, size : 2 * size], hidden[:, :pairs, -2] = keys, values, 1
        hidden[:, pairs:-pairs, :size] = others
        hidden[:, -pairs:, :size], hidden[:, -pairs:, -1] = keys.gather(1, order), 1
        out, _, _ = branch(hidden, torch.zeros(rows, length, dtype=torch.int64), None, Topology())
        loss = (out[:, -pairs:, size : 2 * size] - values.gather(1, order)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-steps // 10 :]
    return sum(last) / len(last) / variance


def test_a_memory_that_writes_nothing_recalls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task above cannot be had without the memory."""
    config = settings("yaad", heads=2, head_dim=16, gate_rank=8)
    monkeypatch.setattr("pipeline.systems.miras.rules.largest_step", lambda config: 0.0)
    assert trained(config) > 0.95


def test_rules_have_a_section_each() -> None:
    fields = {field.name for field in dataclasses.fields(MemoryConfig)}
    assert set(RULES) - {"titans", "delta"} <= fields
