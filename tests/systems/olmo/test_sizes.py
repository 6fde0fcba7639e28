"""The recipes are the published models, to the parameter."""

from __future__ import annotations

import pytest

from pipeline.plan.estimate import count_parameters
from pipeline.recipes import all_recipes


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
