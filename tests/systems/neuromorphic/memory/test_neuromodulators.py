import pytest
import torch

from pipeline.systems.neuromorphic.memory import neuromodulators
from pipeline.systems.neuromorphic.memory.neuromodulators import EpisodicNeuromodulator, ProceduralNeuromodulator
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.weights import initialise
from tests.systems.neuromorphic.memory import small


@pytest.fixture(scope="module")
def initialised() -> NeuromorphicModel:
    model = NeuromorphicModel(small.config())
    initialise(model, 0)
    return model


def inputs(instances: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As an untrained model has them: eligibility of norm 1, half a budget, 4 nats; keys of length 1."""
    scalars = torch.tensor([4.0, 0.5, 0.5]).expand(instances, 3, 3)
    return scalars, torch.nn.functional.normalize(small.random(instances, 3, features).float(), dim=-1)


def test_the_whole_initialised_model_has_procedural_neuromodulators_as_intended(initialised):
    heads = initialised.procedural.neuromodulator
    found = heads.controls(*inputs(heads.heads.weight.shape[0], initialised.sizes.column_width))
    for value, wanted, tolerance in (
        (found.commitment, 0.5, 0.06), (found.gain, 0.5, 0.06), (found.retention, 0.999, 3e-5),
        (found.temperature, 1.0, 0.2), (found.routing, 0.0, 0.25),
    ):  # fmt: skip
        torch.testing.assert_close(value, torch.full_like(value, wanted), atol=tolerance, rtol=0)


def test_the_whole_initialised_model_has_episodic_neuromodulators_as_intended(initialised):
    heads = initialised.episodic.neuromodulator
    found = heads.controls(*inputs(heads.heads.weight.shape[0], initialised.sizes.episodic_width))
    for value, wanted, tolerance in zip(found, (0.3, 1.0, 0.5, 0.999), (0.06, 0.2, 0.1, 3e-4), strict=True):
        torch.testing.assert_close(value, torch.full_like(value, wanted), atol=tolerance, rtol=0)


@pytest.mark.parametrize("memory", ["procedural", "episodic"])
def test_without_what_small_weights_add_the_outputs_are_the_calibrated_ones(initialised, memory):
    heads = getattr(initialised, memory).neuromodulator.heads
    bias = heads.bias.detach().double()
    if memory == "procedural":
        found = [torch.sigmoid(bias[:, 0]), torch.sigmoid(bias[:, 2]), 0.05 + 4.95 * torch.sigmoid(bias[:, 3])]
        wanted = [0.5, 0.5, 1.0]
    else:
        ranges = [(0.001, 0.949), (0.05, 4.95), (0.0, 2.0), (0.99, 0.0099)]
        found = [low + width * torch.sigmoid(bias[:, i]) for i, (low, width) in enumerate(ranges)]
        wanted = [0.3, 1.0, 0.5, 0.999]
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, torch.full_like(value, expected), atol=1e-6, rtol=0)


def test_outputs_are_those_of_the_equations():
    network = small.filled(ProceduralNeuromodulator(2, 5, 3))
    scalars, keys = small.random(2, 4, 3).abs(), small.random(2, 4, 5, seed=1)
    found = network.controls(scalars, keys)
    for i in range(2):
        for n in range(4):
            projected = keys[i, n] @ network.projection.weight[i] + network.projection.bias[i]
            hidden = torch.cat([scalars[i, n], projected]) @ network.inner.weight[i] + network.inner.bias[i]
            raw = hidden.clamp(min=0) @ network.heads.weight[i] + network.heads.bias[i]
            low, width = torch.tensor([[0, 0.999, 0, 0.05], [1, 0.001, 1, 4.95]], dtype=torch.float64)
            wanted = low + width * torch.sigmoid(raw[:4])
            scalar = (found.commitment, found.retention, found.gain, found.temperature)
            torch.testing.assert_close(torch.stack([x[i, n] for x in scalar]), wanted, atol=1e-12, rtol=0)
            torch.testing.assert_close(found.routing[i, n], raw[4:], atol=1e-12, rtol=0)


def test_every_episodic_output_stays_in_its_range():
    network = small.filled(EpisodicNeuromodulator(2, 5))
    found = network.controls(50 * small.random(2, 40, 3).abs(), 50 * small.random(2, 40, 5, seed=1))
    for value, (low, high) in zip(found, [(0.001, 0.95), (0.05, 5), (0, 2), (0.99, 0.9999)], strict=True):
        assert float(value.min()) >= low
        assert float(value.max()) <= high
        assert float(value.max() - value.min()) > 0.5 * (high - low)


def test_outputs_are_in_float32_under_weights_in_bfloat16():
    network = small.filled(EpisodicNeuromodulator(2, 5)).bfloat16()
    found = network.controls(torch.ones(2, 3, 3), torch.ones(2, 3, 5))
    assert {value.dtype for value in found} == {torch.float32}


def test_other_parameters_are_not_calibrated():
    generator = torch.Generator().manual_seed(0)
    for name in ("episodic.key.bias", "procedural.neuromodulator.inner.bias", "head.weight"):
        assert neuromodulators.initial_value(name, torch.Size([2, 3]), generator) is None


def test_an_untrained_model_ranks_episodes_by_surprise(initialised):
    weight = torch.sigmoid(initialised.episodic.novelty.bias.detach())
    torch.testing.assert_close(weight, torch.full_like(weight, 0.95))
