"""Initial weights are OLMo's, as a function of seed and name; what is decayed."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.systems.olmo.config import OlmoConfig
from tests.systems.olmo.harness import built, small

NORMAL = NormalDist()
SPREAD = math.sqrt(1 - 6 * NORMAL.pdf(3) / (2 * NORMAL.cdf(3) - 1))
"""Standard deviation of a normal distribution of 1 that is cut at three."""


def wide(kind: str) -> RunConfig:
    """A model with enough weights in every matrix to tell their spread."""
    config = small(kind)
    assert isinstance(config.model, OlmoConfig)
    backbone = dataclasses.replace(config.model.backbone, layers=2, width=128, ffn=256, vocabulary=512)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


@pytest.mark.parametrize("kind", ["olmo", "olmo2"])
def test_matrices_have_the_spread_of_olmos_own_initialisation(kind: str) -> None:
    _, model = built(wide(kind))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        layer = int(name.split(".layers.")[1][0]) if ".layers." in name else 0
        by_depth = {"o_proj": 1 / math.sqrt(2 * 128 * (layer + 1)), "down_proj": 1 / math.sqrt(2 * 256 * (layer + 1))}
        std = 0.02 if kind == "olmo2" else by_depth.get(name.split(".")[-2], 1 / math.sqrt(128))
        assert 2.5 * std < float(parameter.detach().abs().max()) <= 3 * std * (1 + 1e-6)
        # Five standard errors of an estimate from so many.
        assert float(parameter.detach().std()) == pytest.approx(SPREAD * std, rel=5 / math.sqrt(2 * parameter.numel()))
        assert abs(float(parameter.detach().mean())) < 5 * std / math.sqrt(parameter.numel())


def test_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = (dict(built(small(seed=seed))[1].named_parameters()) for seed in (0, 0, 1))
    for name, value in one.items():
        assert torch.equal(value, same[name]) and not torch.equal(value, other[name]), name
    first, second = (one[f"backbone.model.layers.{index}.self_attn.q_proj.weight"] for index in (0, 1))
    assert not torch.equal(first, second)


def decayed(config: RunConfig) -> set[str]:
    system, model = built(config)
    (phase,) = system.phases(model)
    assert {name for group in phase.groups for name in group.parameters} == {
        name for name, _ in model.named_parameters()
    }
    return {name for group in phase.groups if group.weight_decay for name in group.parameters}


def test_linear_weights_alone_are_decayed_and_in_olmo2_norms_too() -> None:
    linear = decayed(small("olmo", weight_decay=0.1))
    # Tied: the embedding is the head, and not decayed.
    assert linear and all(name.endswith("_proj.weight") for name in linear)
    found = decayed(small("olmo2", weight_decay=0.1))
    everything = {name for name, _ in built(small("olmo2"))[1].named_parameters()}
    assert everything - found == {"backbone.model.embed_tokens.weight"}
    assert "backbone.lm_head.weight" in found


def test_embeddings_are_decayed_where_that_is_asked_for() -> None:
    config = small("olmo", weight_decay=0.1)
    assert isinstance(config.model, OlmoConfig)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decay_embeddings=True))
    assert "backbone.model.embed_tokens.weight" in decayed(config)
