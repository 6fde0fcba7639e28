"""Metrics: each is what it says, the pictures show none that is not there, and nothing waits for the device."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.system import Evaluation
from pipeline.systems.neuromorphic.evaluation.ablations import NOTHING, ablation_summary, ablations_of
from pipeline.systems.neuromorphic.evaluation.pictures import panels
from pipeline.systems.neuromorphic.state import Uses
from pipeline.systems.neuromorphic.statistics import (
    gradient_squares,
    named_statistics,
    step_metrics,
)
from pipeline.systems.neuromorphic.stream_tensors import mapped
from tests.systems.neuromorphic.small import EOS, SIZES, documents, small_model

ROWS, TOKENS, SPAN = 3, 24, SIZES.span


@pytest.fixture(scope="module")
def model():
    return small_model()


def batches() -> list[TokenBatch]:
    """Two steps of three streams; a document ends in every one."""
    ids = torch.randint(1, SIZES.vocab, (ROWS, 2 * TOKENS), generator=torch.Generator().manual_seed(2))
    ids[0, 5] = ids[1, 30] = ids[2, 33] = ids[2, TOKENS - 1] = EOS
    labels, segments, positions = documents(ids)
    parts = [slice(0, TOKENS), slice(TOKENS, None)]
    streams = torch.arange(ROWS)
    return [TokenBatch(ids[:, part], labels[:, part], segments[:, part], positions[:, part], streams) for part in parts]


def steps(model, uses: Uses):
    """Both steps: (batch, state before, output)."""
    state = None
    for batch in batches():
        arguments = (batch.input_ids, batch.labels, batch.segment_ids, batch.positions, state, uses)
        output = model(*arguments, statistics=True)
        yield batch, state, output
        state = output.state


def means(metrics) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in metrics.items()}


@pytest.mark.parametrize("lifelong", [False, True])
def test_shares_of_a_step(model, lifelong: bool) -> None:
    uses = Uses(lifelong=lifelong)
    (_, (batch, before, output)) = list(steps(model, uses))
    found = means(step_metrics(batch, before, output, uses, SIZES, EOS))
    valid, resets, in_span = 0, 0, 0
    for row in range(ROWS):
        document = int(before.segment[row])
        for t in range(TOKENS):
            resets += int(batch.segment_ids[row, t]) != document
            document = int(batch.segment_ids[row, t])
            counts = int(batch.labels[row, t]) != IGNORED
            valid += counts
            end = t // SPAN * SPAN + SPAN - 1
            in_span += counts and document == int(batch.segment_ids[row, end])
    tokens = ROWS * TOKENS
    assert found["valid_tokens"] == valid and found["valid_fraction"] == pytest.approx(valid / tokens)
    assert found["reset_fraction"] == pytest.approx(resets / tokens) and resets == 3
    assert found["eot_input_fraction"] == pytest.approx(2 / tokens)
    assert found["mean_span_valid_tokens"] == pytest.approx(in_span / (tokens / SPAN))
    assert found["warn_low_valid_fraction"] == 0
    strengths, episodes = (m.strengths.detach() for m in (output.state.procedural, output.state.episodic))
    assert found["pm_budget_util_global"] == pytest.approx(float(strengths.sum(-1).mean()) / 4)
    assert found["em_budget_util_global"] == pytest.approx(float(episodes.sum(-1).mean()) / 8)
    expected = float(sum(output.penalties.values())) * SIZES.strength_penalty / ROWS
    assert found["reg"] == pytest.approx(expected)
    assert ("pm_persistence" in found) == lifelong
    if lifelong:
        old = before.procedural.strengths
        assert found["pm_persistence"] == pytest.approx(float(torch.minimum(old, strengths).sum() / old.sum()))
        assert 0 < found["em_persistence"] <= 1


def test_warnings(model) -> None:
    batch, before, output = next(steps(model, Uses()))
    ignored = dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORED))
    full = dataclasses.replace(output.state.episodic, strengths=torch.full_like(output.state.episodic.strengths, 2))
    output = output._replace(state=dataclasses.replace(output.state, episodic=full))
    found = means(step_metrics(ignored, before, output, Uses(), SIZES, None))
    assert found["warn_low_valid_fraction"] == 1 and found["warn_memory_saturation"] == 1
    assert "eot_input_fraction" not in found


def test_measures_have_the_names_of_the_reference(model) -> None:
    _, _, output = next(steps(model, Uses()))
    found = means(named_statistics(output.statistics))
    for name, (total, count) in output.statistics.items():
        mean = total / count
        for layer in range(SIZES.sizes.layers):
            for column in range(SIZES.sizes.columns):
                keys = {f"b{column}_l{layer}_{name}", f"pm_b{column}_l{layer}_{name.removeprefix('pm_')}"} & set(found)
                assert all(found[key] == pytest.approx(float(mean[layer, column])) for key in keys)
    for column in range(SIZES.sizes.columns):
        for name in ("S_mean", "S_max", "S_sum", "nonzero"):
            expected = float(output.statistics[f"em_{name}"][0][column] / output.statistics[f"em_{name}"][1])
            assert found[f"em_b{column}_{name}"] == pytest.approx(expected)
    rates = output.statistics["pm_commit_rate"][0] / output.statistics["pm_commit_rate"][1]
    assert found["pm_commit_rate_mean"] == pytest.approx(float(rates.mean()))
    assert found["pm_commit_rate_b1"] == pytest.approx(float(rates[:, 1].mean()))
    reference = {
        "b0_l1_gate_a_mean", "b1_l0_h_norm", "pm_b1_l1_a_mean", "pm_b0_l0_a_max", "pm_b0_l0_a_sum", "pm_b0_l0_nonzero",
        "pm_b0_l0_elig_norm", "pm_commit_rate_mean", "em_novelty_mean_b0", "em_g_em_mean_b1", "em_b1_S_max",
        "warn_gate_saturation",
    }  # fmt: skip
    assert reference <= set(found)
    # Of gates that are not all shut or all open, none of which is a placeholder.
    assert 0 < found["b0_l0_gate_a_mean"] < 1 and found["warn_gate_saturation"] == 0


def test_nothing_waits_for_the_device(model) -> None:
    """A tensor without storage cannot be read."""
    (_, (batch, before, output)) = list(steps(model, Uses(lifelong=True)))
    states = [mapped(state, lambda _, tensor: tensor.to("meta")) for state in (before, output.state)]
    measures = {name: (total.to("meta"), count.to("meta")) for name, (total, count) in output.statistics.items()}
    penalties = {name: value.to("meta") for name, value in output.penalties.items()}
    output = output._replace(state=states[1], penalties=penalties, statistics=measures)
    found = step_metrics(batch.to(torch.device("meta")), states[0], output, Uses(lifelong=True), SIZES, EOS)
    assert {total.device.type for total, _ in (found | named_statistics(measures)).values()} == {"meta"}


def test_entropy_of_the_working_memory(model) -> None:
    (_, (batch, before, _)) = list(steps(model, Uses()))
    working = model.working
    for carry in (before.working, None):
        before = dataclasses.replace(before, working=carry)
        arguments = (batch.input_ids, batch.labels, batch.segment_ids, batch.positions, before)
        found = means(named_statistics(model(*arguments, statistics=True).statistics))
        keys = [] if carry is None else [carry.k]
        x = model.embedding(batch.input_ids)
        keys.append(working.key(x).view(ROWS, TOKENS, working.heads, -1))
        k = torch.cat(keys, 1)
        segments = torch.cat(([] if carry is None else [carry.segment_ids]) + [batch.segment_ids], 1)
        positions = torch.cat(([] if carry is None else [carry.positions]) + [batch.positions], 1)
        q = working.query(x).view(ROWS, TOKENS, working.heads, -1)
        offset = k.shape[1] - TOKENS
        entropies, seen = torch.zeros(working.heads, dtype=torch.float64), 0
        for row in range(ROWS):
            for t in range(TOKENS - SPAN, TOKENS):
                places = [
                    s for s in range(max(0, offset + t - working.window + 1), offset + t + 1)
                    if segments[row, s] == batch.segment_ids[row, t]
                ]  # fmt: skip
                seen += len(places)
                for head in range(working.heads):
                    turned = turn(q[row, t, head], int(batch.positions[row, t]))
                    scores = torch.stack([turned @ turn(k[row, s, head], int(positions[row, s])) for s in places])
                    shares = (scores / math.sqrt(working.head_width)).softmax(0)
                    entropies[head] -= (shares * shares.log()).sum().detach()
        for head in range(working.heads):
            assert found[f"wm_entropy_h{head}"] == pytest.approx(float(entropies[head]) / (ROWS * SPAN), rel=1e-5)
        assert found["wm_entropy_mean"] == pytest.approx(float(entropies.mean()) / (ROWS * SPAN), rel=1e-5)
        assert found["wm_buffer_util"] == pytest.approx(seen / working.window / (ROWS * SPAN))


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    """RoPE as complex numbers: pair i of the halves turns by position * 10000^(-2i / width)."""
    width = len(x)
    one, two = x[: width // 2], x[width // 2 :]
    angles = torch.tensor([position * 10_000.0 ** (-2 * i / width) for i in range(width // 2)], dtype=x.dtype)
    turned = torch.complex(one, two) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def test_squares_of_gradients_add_up(model) -> None:
    _, _, output = next(steps(model, Uses()))
    model.zero_grad()
    output.losses.sum().backward()
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for metric, value in gradient_squares(name, parameter.grad).items():
                found[metric] = found.get(metric, 0.0) + float(value)
    modules = {name: value for name, value in found.items() if "_b" not in name}
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert sum(modules.values()) == pytest.approx(total, rel=1e-4)
    layers = [value for name, value in found.items() if "_b" in name]
    assert len(layers) == 4 and sum(layers) == pytest.approx(found["gnorm_layers"], rel=1e-4)
    of_one = sum(float(p.grad[1].square().sum()) for p in model.layers[0].parameters())
    assert found["gnorm_b1_l0"] == pytest.approx(of_one, rel=1e-4)


def test_pictures_show_what_there_is(model) -> None:
    batch, before, output = list(steps(model, Uses()))[1]
    every = set(named_statistics(output.statistics)) | set(step_metrics(batch, before, output, Uses(), SIZES, EOS))
    for name, parameter in model.named_parameters():
        every |= set(gradient_squares(name, torch.zeros_like(parameter)))
    found = {way.name: Evaluation({"loss": 1.0, "ppl": 1.0}) for way in ablations_of(Uses())}
    assert NOTHING in found
    every |= set(ablation_summary(found)) | {"loss", "ppl", "lr", "tok_s", "grad_norm"}
    shown = panels(SIZES.sizes)
    assert list(shown) == ["training", "pm", "em", "gates", "wm", "gradients"]
    for parts in shown.values():
        for panel in parts:
            keys = {*panel.lines.values(), *(key for row in panel.grid for key in row)}
            assert keys and keys <= every, panel.title
