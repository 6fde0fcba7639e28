from __future__ import annotations

import pytest
import torch

from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.weights import PARTS, initialise, parameter_parts, part_of
from tests.systems.neuromorphic.model.test_model import text
from tests.systems.neuromorphic.small import SIZES

PUBLISHED = {
    "a": (56_070_400, 56_080_692), "a_wide": (94_548_928, None), "b": (102_704_928, 102_726_510),
    "c": (196_765_696, 196_802_664),
}  # fmt: skip


@pytest.mark.parametrize("tier", PUBLISHED)
def test_as_published_the_parameters_are_as_many(tier: str) -> None:
    config = NeuromorphicConfig(tier=tier, as_published=True)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = NeuromorphicModel(config)
    first, later = PUBLISHED[tier]
    every = sum(parameter.numel() for parameter in model.parameters())
    # The published system builds what writes episodic memory from phase B on.
    writing = ("episodic.neuromodulator.", "episodic.novelty.")
    assert every - sum(x.numel() for name, x in model.named_parameters() if name.startswith(writing)) == first
    if later is not None:
        assert every == later
    parts = parameter_parts(model)
    assert sum(parts.values()) == every and list(parts) == [part for part, _ in PARTS]


def test_parts_of_tier_b_are_those_of_the_reference() -> None:
    with torch.device("meta"):
        parts = parameter_parts(NeuromorphicModel(NeuromorphicConfig(as_published=True)))
    assert parts["embedding and head"] == 49_152_000
    millions = {name: round(parts[name] / 1e6, 1) for name in ("gates", "procedural memory", "episodic memory")}
    # The reference counts procedural memory without its neuromodulator, and episodic without W_em.
    assert millions == {"gates": 9.5, "procedural memory": 12.0, "episodic memory": 7.9}


@torch.no_grad()
def test_neuromodulators_say_at_the_start_what_they_are_calibrated_to() -> None:
    """Of the whole initialised model, as it commits and writes."""
    model = NeuromorphicModel(SIZES)
    initialise(model, 0)
    found = model(*text([[], [5]], tokens=32), statistics=True).statistics
    wanted = {
        "pm_commit_rate": (0.5, 0.02), "pm_gain": (0.5, 0.02), "pm_retention": (0.999, 1e-4),
        "pm_temperature": (1.0, 0.05), "em_gain": (0.3, 0.02), "em_temperature": (1.0, 0.05),
        "em_aversion": (0.5, 0.05), "em_decay": (0.999, 1e-4),
    }  # fmt: skip
    for name, (value, within) in wanted.items():
        total, count = found[name]
        assert float((total / count - value).abs().max()) < within, name


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    models = [NeuromorphicModel(SIZES) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 7)
        initialise(model, seed)
    one, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    random = [name for name in one if float(one[name].detach().std()) > 0 and not name.endswith("heads.bias")]
    assert all(not torch.equal(one[name], other[name]) for name in random) and len(random) > 30
    # A column's map is scaled by its own inputs and outputs, not by all columns'.
    query = one["episodic.query.weight"].detach()
    bound = (6 / (2 * SIZES.sizes.width + SIZES.sizes.episodic_width)) ** 0.5
    assert 0.9 * bound < float(query.abs().max()) <= bound
    assert {part_of(name) for name in one} == {part for part, _ in PARTS}


def test_the_same_sizes_without_dead_parameters_have_fewer() -> None:
    """Unless as published there are no keys' biases that a softmax drops, and no queries of one key."""
    with torch.device("meta"):
        every, live = (
            {name for name, _ in NeuromorphicModel(NeuromorphicConfig(as_published=x)).named_parameters()}
            for x in (True, False)
        )
    dead = every - live
    assert live < every and all(
        name.endswith(("key.bias", "key.weight", "query.weight", "query.bias")) for name in dead
    )
    assert len(dead) == 1 + 2 + 2 + 2 * (4 + 1)
