"""The estimate of a decoder that is trained as a whole is that of a model whose memories are left out."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.lm.activations import TrainedDecoder, decoder_bytes
from pipeline.lm.config import AttentionConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.recipes.olmo import olmo2_1b
from pipeline.systems.miras.activation_step import Step
from pipeline.systems.miras.activations import step_bytes
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.olmo.config import OlmoConfig


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("element, degree", [(2, 1), (4, 4)])
def test_it_is_the_traced_estimate_without_memories(recompute: bool, element: int, degree: int) -> None:
    model = olmo2_1b().model
    assert isinstance(model, OlmoConfig)
    attention = AttentionConfig("full")
    without = MirasConfig(backbone=model.backbone, attention=attention, memory=MemoryConfig(layers=()))
    backbone, sizes = backbone_config(model.backbone), {"rows": 4, "sequence": 4096, "degree": degree}
    traced = Step(without, backbone, element, **sizes, recompute=recompute)
    found = decoder_bytes(TrainedDecoder(backbone, attention, element, **sizes, recompute=recompute))
    assert found == step_bytes(traced)


def test_recomputation_keeps_less() -> None:
    model = olmo2_1b().model
    assert isinstance(model, OlmoConfig)
    step = TrainedDecoder(backbone_config(model.backbone), AttentionConfig("full"), 2, rows=4, sequence=4096)
    assert decoder_bytes(dataclasses.replace(step, recompute=True))[0] < decoder_bytes(step)[0] / 5
