"""The recipes are the published models, to the parameter."""

from __future__ import annotations

import pytest

from pipeline.lm.pretrained import backbone_config
from pipeline.plan.estimate import count_parameters
from pipeline.recipes import all_recipes
from pipeline.systems.olmo.config import OlmoConfig


@pytest.mark.parametrize(
    "name, parameters",
    [("olmo_1b", 1_176_764_416), ("olmo_1b_0724", 1_279_787_008), ("olmo2_1b", 1_484_916_736)],
)
def test_parameters_are_those_of_the_published_model(name: str, parameters: int) -> None:
    counts = count_parameters(all_recipes()[name]())
    assert counts.parameters == counts.trainable == parameters


def test_the_recipe_is_the_guides() -> None:
    config = all_recipes()["olmo_1b"]()
    assert (config.steps, config.lr, config.warmup_steps, config.weight_decay, config.clip) == (7640, 4e-4, 500, 0.1, 1)
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-5)
    assert (optimizer.warmup_start, optimizer.min_lr_ratio, optimizer.schedule) == (0.1, 0.1, "cosine")
    assert (config.sequence_length, config.batch_size, config.global_batch_size) == (2048, 8, 64)
    assert config.steps * 64 * 2048 == 1_001_390_080


@pytest.mark.parametrize(
    "name, kind, tied, clip_qkv, length, vocabulary, theta, rows, micro",
    [
        ("olmo_1b", "olmo", True, None, 2048, 50_304, 10_000.0, 64, 8),
        ("olmo_1b_0724", "olmo", False, 8.0, 4096, 50_304, 10_000.0, 32, 4),
        ("olmo2_1b", "olmo2", False, None, 4096, 100_352, 500_000.0, 512, 4),
    ],
)
def test_what_differs_between_the_generations(
    name: str, kind: str, tied: bool, clip_qkv: float | None, length: int, vocabulary: int, theta: float, rows: int,
    micro: int,
) -> None:  # fmt: skip
    """Their counts of parameters do not tell: neither clipping nor the sequence length is one."""
    config = all_recipes()[name]()
    assert isinstance(config.model, OlmoConfig)
    sizes = config.model.backbone
    assert (sizes.model_type, sizes.tied, sizes.clip_qkv) == (kind, tied, clip_qkv)
    assert (sizes.layers, sizes.width, sizes.heads, sizes.ffn) == (16, 2048, 16, 8192)
    assert (sizes.vocabulary, sizes.rope_theta) == (vocabulary, theta)
    assert (config.sequence_length, config.global_batch_size, config.batch_size) == (length, rows, micro)
    assert config.model.z_loss == (1e-5 if kind == "olmo2" else 0.0)
    # What transformers builds of it.
    decoder = backbone_config(sizes)
    assert getattr(decoder, "clip_qkv", None) == clip_qkv and decoder.tie_word_embeddings == tied
