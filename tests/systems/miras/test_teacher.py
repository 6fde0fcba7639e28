"""The teacher is the backbone with full attention, and the terms and gradients are those of whole logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.lm.backbone import build_backbone
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.parallel.topology import Topology
from pipeline.system import StepContext
from pipeline.systems.miras import create
from pipeline.systems.miras.config import DistillationConfig
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import LENGTH, attached, base
from tests.lm.families import FAMILIES, decoder, our_logits, plain_logits, save_decoder
from tests.systems.miras.harness import CONTEXT, batch, built, cut, run, tokens

WINDOW, SINKS = 10, 2
LENGTHS = [20, LENGTH - 20]


def distilled(config: RunConfig | None = None, **settings: Any) -> RunConfig:
    config = config or base(trainable=False)
    model = dataclasses.replace(config.model, distil="full", distillation=DistillationConfig(**settings))  # type: ignore[call-arg]
    return dataclasses.replace(config, model=model)


def frozen(
    config: RunConfig, *, dtype: torch.dtype = torch.float64, noisy: bool = True
) -> tuple[MirasSystem, MirasModel]:
    system, model = built(config, dtype=dtype, noisy=noisy)
    model.backbone.requires_grad_(False)
    return system, model


def pretrained(folder: Path, **settings: Any) -> RunConfig:
    config = base(trainable=False)
    return distilled(
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, backbone=BackboneConfig(pretrained=str(folder))),  # type: ignore[call-arg]
        ),
        **settings,
    )


def beyond(lengths: list[int]) -> Tensor:
    """[LENGTH] bool: the tokens that see more than the window."""
    return torch.cat([torch.arange(length) >= WINDOW for length in lengths])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_divergence_is_from_what_transformers_gives_with_full_attention(name: str, tmp_path: Path) -> None:
    """A memory that is new adds nothing: the student is the backbone with its window."""
    folder = save_decoder(name, tmp_path)
    config = pretrained(folder)
    system, model = frozen(config, dtype=torch.float32, noisy=False)
    output = run(system, model, batch(tokens(), LENGTHS))
    plain = decoder(name)
    student = build_backbone(backbone_config(BackboneConfig(pretrained=str(folder))))
    student.load_state_dict(plain.state_dict())
    ids = tokens().unsqueeze(0)
    with torch.no_grad():
        expected = plain_logits(plain, ids, LENGTHS)[0].double().log_softmax(-1)
        found = our_logits(student, ids, LENGTHS, system.sizes.attention)[0].double().log_softmax(-1)
    divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)[beyond(LENGTHS)].sum()
    assert float(divergence) > 0.01
    assert float(output.sums["kl"].detach()) == pytest.approx(float(divergence), rel=1e-4)
    assert system.count(batch(tokens(), LENGTHS))["kl"] == int(beyond(LENGTHS).sum())


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """Squared errors of rows, relative to the squares of what is expected."""
    return (found - expected).square().sum(-1) / expected.square().sum(-1)


@pytest.mark.parametrize("attachment", ["residual", "mal", "mag", "mac", "overflow"])
@pytest.mark.parametrize("lower", ["full", "window"])
def test_terms_and_gradients_are_those_of_whole_logits(attachment: str, lower: str) -> None:
    weights = {"kl": 0.7, "hidden": 0.4, "attention": 0.6, "cross_entropy": 0.3}
    config = distilled(attached(attachment, trainable=False), **weights, lower_layers=lower)
    system, model = frozen(config)
    states: dict[Any, list[Tensor]] = {}
    for index, layer in enumerate(model.backbone.model.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: states.setdefault(index, []).append(out))
    for index in (1, 2):
        projection = model.backbone.model.layers[index].self_attn.o_proj
        projection.register_forward_pre_hook(
            lambda _, given, index=index: states.setdefault(f"attention {index}", []).append(given[0])
        )
    model.backbone.model.norm.register_forward_hook(lambda _, __, out: states.setdefault("norm", []).append(out))
    part = batch(tokens(), LENGTHS)
    output = run(system, model, part)
    names, memory = zip(*model.memory.named_parameters(), strict=True)
    gradients = torch.autograd.grad(sum(output.sums.values()), memory, retain_graph=True)

    chosen, weight = beyond(LENGTHS), model.backbone.lm_head.weight
    teacher, student = states["norm"][0], states["norm"][1][0]
    logits = [(x @ weight.T).log_softmax(-1) for x in (student[chosen], teacher)]
    kl = F.kl_div(*logits, reduction="sum", log_target=True)
    losses = F.cross_entropy(student @ weight.T, part.labels[0], ignore_index=-100, reduction="sum")
    expected = {"kl": 0.7 * kl, "cross_entropy": 0.3 * losses}
    for name, value in expected.items():
        torch.testing.assert_close(output.sums[name], value, rtol=1e-10, atol=0)
    attended = [relative(*(states[f"attention {index}"][which][0][chosen] for which in (1, 0))) for index in (1, 2)]
    expected["attention"] = 0.6 * torch.stack(attended).mean(0).sum()
    torch.testing.assert_close(output.sums["attention"], expected["attention"], rtol=1e-10, atol=0)
    # What a residual memory adds comes after the layer's own output.
    if attachment != "residual":
        errors = [relative(*(states[index][which][0][chosen] for which in (1, 0))) for index in (1, 2)]
        expected["hidden"] = 0.4 * torch.stack(errors).mean(0).sum()
        torch.testing.assert_close(output.sums["hidden"], expected["hidden"], rtol=1e-10, atol=0)
    else:
        expected["hidden"] = output.sums["hidden"]
    assert float(output.sums["hidden"].detach()) > 0
    for name, found, reference in zip(
        names, gradients, torch.autograd.grad(sum(expected.values()), memory), strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-11, msg=name)


def test_the_hidden_term_of_a_residual_memory_counts_what_it_adds() -> None:
    """With the memory on the last layer alone its input of the last norm is what is compared."""
    config = distilled(base(trainable=False), kl=0.0, hidden=1.0)
    memory = dataclasses.replace(config.model.memory, layers=(2,))  # type: ignore[attr-defined]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))  # type: ignore[call-arg]
    system, model = frozen(config)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    model.backbone.model.layers[2].register_forward_hook(lambda _, __, out: outputs.append(out))
    model.backbone.model.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    output = run(system, model, batch(tokens(), LENGTHS))
    # Without a divergence the teacher ends with the last memory's layer, here the last.
    (student,) = (given[0][beyond(LENGTHS)] for given in inputs)
    (teacher,) = outputs[:1]
    teacher = teacher[0][beyond(LENGTHS)]
    expected = relative(student, teacher).sum()
    torch.testing.assert_close(output.sums["hidden"], expected, rtol=1e-10, atol=0)
    assert output.sums.keys() == {"cross_entropy", "hidden"}


def entered(config: RunConfig) -> dict[int, list[Tensor]]:
    """What goes into each layer in a forward pass."""
    system, model = frozen(config)
    found: dict[int, list[Tensor]] = {}
    for index, layer in enumerate(model.backbone.model.layers):
        layer.register_forward_pre_hook(lambda _, given, index=index: found.setdefault(index, []).append(given[0]))
    run(system, model, batch(tokens(), [LENGTH]))
    return found


def test_layers_below_the_first_memory_run_once_where_both_see_the_window() -> None:
    shared = entered(distilled(lower_layers="window"))
    assert {index: len(given) for index, given in shared.items()} == {0: 1, 1: 2, 2: 2}
    teacher, student = shared[1]
    assert torch.equal(teacher, student)
    apart = entered(distilled())
    assert {index: len(given) for index, given in apart.items()} == {0: 2, 1: 2, 2: 2}
    # The student's are the same bits, and the teacher's differ only beyond the window and the sinks.
    assert torch.equal(apart[1][1], student)
    different = (apart[1][0] != apart[1][1]).any(-1)[0]
    torch.testing.assert_close(apart[1][0][:, :WINDOW], apart[1][1][:, :WINDOW], rtol=1e-12, atol=1e-12)
    assert different[WINDOW + SINKS :].all()


def test_documents_in_one_row_are_those_of_a_row_each() -> None:
    system, model = frozen(distilled(hidden=1.0))
    together = run(system, model, batch(tokens(), LENGTHS)).sums
    apart = [run(system, model, batch(piece, [len(piece)])).sums for piece in tokens().split(LENGTHS)]
    for term in ("kl", "hidden"):
        torch.testing.assert_close(together[term], sum(sums[term] for sums in apart), rtol=1e-9, atol=0)


def test_in_a_later_step_the_teacher_sees_that_step_alone_and_the_student_its_carry() -> None:
    system, model = frozen(distilled(cross_entropy=1.0))
    whole = batch(tokens(), [LENGTH])
    first = run(system, model, cut(whole, 0, 24))
    later = cut(whole, 24, LENGTH)
    assert system.count(later)["kl"] == 24 - WINDOW
    found = run(system, model, later, first.carry)
    plain, _ = frozen(base(trainable=False))
    torch.testing.assert_close(found.tokens["losses"], run(plain, model, later, first.carry).tokens["losses"])
    without_carry = run(system, model, later)
    assert not torch.equal(found.sums["kl"], without_carry.sums["kl"])


def test_a_teacher_without_a_divergence_ends_with_the_last_memory() -> None:
    config = distilled(attached("mag", trainable=False), kl=0.0, attention=1.0)
    memory = dataclasses.replace(config.model.memory, layers=(1,))  # type: ignore[attr-defined]
    given = entered(dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory)))  # type: ignore[call-arg]
    assert {index: len(inputs) for index, inputs in given.items()} == {0: 2, 1: 2, 2: 1}


class Engine(nn.Module):
    """As DeepSpeed's: `eval` reaches the module alone, and the engine says that it is training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *words: Any, **options: Any) -> Any:
        return self.module(*words, **options)

    def eval(self) -> Engine:
        self.module.eval()
        return self


def test_an_evaluation_asks_no_teacher() -> None:
    system, model = frozen(distilled())
    engine = Engine(model).eval()
    assert engine.training
    output = system.forward(engine, batch(tokens(), LENGTHS), {}, CONTEXT)
    assert output.sums.keys() == {"cross_entropy"} and output.tokens["losses"].any()


def test_random_tokens_are_counted_and_change_from_step_to_step() -> None:
    system, model = frozen(distilled(tokens=5))
    part = batch(tokens(), [LENGTH])
    assert system.count(part)["kl"] == 5
    steps = [dataclasses.replace(CONTEXT, step=step) for step in (1, 1, 2)]
    sums = [float(system.forward(model, part, {}, context).sums["kl"].detach()) for context in steps]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
def test_lower_precisions_give_about_the_same(dtype: torch.dtype, tolerance: float) -> None:
    found = []
    for precision in (dtype, torch.float64):
        system, model = frozen(distilled(hidden=1.0), dtype=precision)
        output = run(system, model, batch(tokens(), [LENGTH]))
        sum(output.sums.values()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad.double() for p in model.memory.parameters()])
        found.append([float(output.sums["kl"]), float(output.sums["hidden"]), float(norm)])
    assert found[0] == pytest.approx(found[1], rel=tolerance)


def test_recomputation_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        config = dataclasses.replace(distilled(hidden=0.5, attention=2.0), activation_checkpointing=recompute)
        system, model = frozen(config)
        sum(run(system, model, batch(tokens(), LENGTHS)).sums.values()).backward()
        gradients.append([p.grad for p in model.memory.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_longer_than_trained_is_said_and_not_compared(tmp_path: Path) -> None:
    """The small decoders were trained at 256 positions."""
    folder = save_decoder("llama", tmp_path)
    config = dataclasses.replace(pretrained(folder, tokens=100), sequence_length=300)
    system = create(config)
    line = system.describe("cpu", torch.float32)["distillation"]
    assert line == (
        "KL; teacher: full attention; 100 random tokens a row beyond the window of 10, up to 256 tokens into the"
        " document: the backbone sees no further, or was not trained to, so later ones are not compared"
    )
    assert system.count(batch(torch.zeros(300, dtype=torch.int64), [300]))["kl"] == 100
    whole = create(dataclasses.replace(pretrained(folder), sequence_length=300))
    assert whole.count(batch(torch.zeros(300, dtype=torch.int64), [300]))["kl"] == 256 - WINDOW
    shorter = create(dataclasses.replace(pretrained(folder), sequence_length=256))
    assert "further" not in shorter.describe("cpu", torch.float32)["distillation"]


def test_full_attention_ends_where_the_layers_of_the_backbone_see_no_further(tmp_path: Path) -> None:
    """The small mistral has a sliding window of 64 tokens."""
    system = create(dataclasses.replace(pretrained(save_decoder("mistral", tmp_path)), sequence_length=100))
    assert system.count(batch(torch.zeros(100, dtype=torch.int64), [100]))["kl"] == 64 - WINDOW


def test_what_cannot_be_distilled_is_refused_in_one_line() -> None:
    def refused(message: str, config: RunConfig, **model: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            create(dataclasses.replace(config, model=dataclasses.replace(config.model, distil="full", **model)))  # type: ignore[call-arg]
        assert "\n" not in str(caught.value)

    frozen_base = base(trainable=False)
    sizes = frozen_base.model
    refused("--model.distil full: the backbone is its own teacher .*leave out --model.backbone.trainable", base())
    refused(
        "there is no memory to train: name --model.memory.layers",
        frozen_base,
        memory=dataclasses.replace(sizes.memory, layers=()),  # type: ignore[attr-defined]
    )
    refused(
        "the student has full attention as well.*give --model.attention.kind window",
        frozen_base,
        attention=dataclasses.replace(sizes.attention, kind="full"),  # type: ignore[attr-defined]
    )
    refused(
        "--model.attention.window 48 holds all of --sequence-length 48.*give a window below 48",
        frozen_base,
        attention=dataclasses.replace(sizes.attention, window=48),  # type: ignore[attr-defined]
    )
    refused(
        "--model.distillation.attention: a residual memory is beside its layer's attention",
        frozen_base,
        memory=dataclasses.replace(sizes.memory, layers=(2,)),  # type: ignore[attr-defined]
        distillation=DistillationConfig(kl=0.0, attention=1.0),
    )
    for settings, message in (
        ({"kl": -1.0}, "--model.distillation.kl is -1.0: give 0 or more"),
        ({"cross_entropy": float("nan")}, "--model.distillation.cross-entropy is nan"),
        ({"kl": 0.0}, "kl, .hidden and .attention are 0"),
        ({"tokens": -1}, "--model.distillation.tokens is -1"),
    ):
        with pytest.raises(UserError, match=message):
            DistillationConfig(**settings)


def test_a_step_names_its_terms_and_counts_tokens_by_the_labels() -> None:
    system, model = frozen(distilled(hidden=0.5))
    part = batch(tokens(), LENGTHS)
    output = system.forward(model, part, {}, StepContext(Topology(), 0, "train", 1))
    assert output.sums.keys() == system.count(part).keys() == {"cross_entropy", "kl", "hidden"}
    assert system.count(part)[system.token_term] == LENGTH - 2
    assert float(output.sums["cross_entropy"]) == 0 and "losses" not in output.tokens
    assert system.token_weight == 0, "no perplexity is known of it"
    assert frozen(distilled(cross_entropy=0.25))[0].token_weight == 0.25
