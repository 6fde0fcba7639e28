"""Every shipped recipe builds, and the long-context ones are the guide's."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.ds_config import CONFIG_FOLDER, config_path, deepspeed_config
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.recipes import all_recipes, describe
from pipeline.system import create_system

RECIPES = all_recipes()
CONFIGS = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))

every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


def test_the_recipes_of_miras_are_all_there() -> None:
    expected = {"miras_32k", "miras_64k", "miras_128k", "miras_tiny", "miras_recall", "miras_recall_delta"}
    assert expected <= set(RECIPES)


@every_recipe
def test_a_recipe_has_the_name_of_its_function(name: str) -> None:
    config = RECIPES[name]()
    assert isinstance(config, RunConfig)
    assert config.recipe == name == RECIPES[name].__name__
    assert config == RECIPES[name]()


@every_recipe
def test_bfloat16_on_a_cpu_is_for_models_that_gain_by_it(name: str) -> None:
    """Below a width of 512 conversions cost what the matrix units gain; the numbers of tiny recipes are compared."""
    config = RECIPES[name]()
    backbone = getattr(config.model, "backbone", None)
    narrow = name.endswith("_tiny") or getattr(backbone, "width", 512) < 512
    assert config.precision == "auto" or (config.precision in ("auto-amx", "bf16") and not narrow)


@every_recipe
def test_a_recipe_says_what_it_is_in_a_line(name: str) -> None:
    line = describe(RECIPES[name])
    assert 20 < len(line) < 120
    assert line == (inspect.getdoc(RECIPES[name]) or "").splitlines()[0]
    assert line.endswith(".")


@every_recipe
def test_a_recipe_has_a_run_directory_of_its_own(name: str) -> None:
    assert RECIPES[name]().output_dir == Path("outputs") / name


@every_recipe
def test_a_recipe_builds_its_model(name: str) -> None:
    config = RECIPES[name]()
    system = create_system(config)
    system.check(Topology(world=config.parallel.sequence, sequence=config.parallel.sequence))
    with torch.device("meta"):
        model = system.build()
    parameters = dict(model.named_parameters())
    phases = system.phases(model)
    # Of several phases, some may have numbers of their own.
    assert any(phase.steps == config.steps for phase in phases) and all(phase.steps > 0 for phase in phases)
    assert len(phases) == {"cvfp": 2, "neuromorphic": 3}.get(system.name, 1)
    for phase in phases:
        trained = [parameter for group in phase.groups for parameter in group.parameters]
        assert trained and len(trained) == len(set(trained))
        assert set(trained) <= set(parameters)


def autos(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [found for key, value in content.items() for found in (autos(value) or [key] * (value == "auto"))]
    if isinstance(content, list):
        return [found for value in content for found in autos(value)]
    return []


@every_recipe
@pytest.mark.parametrize("zero", CONFIGS)
def test_every_deepspeed_configuration_resolves(name: str, zero: str) -> None:
    config = dataclasses.replace(RECIPES[name](), zero=zero, batch_size=3, grad_accum=5, clip=0.7)
    resolved = deepspeed_config(config)
    assert autos(resolved) == []
    assert resolved["train_micro_batch_size_per_gpu"] == 3
    assert resolved["gradient_accumulation_steps"] == 5
    assert resolved["gradient_clipping"] == 0.7
    assert resolved["zero_optimization"]["stage"] == int(zero.removeprefix("zero")[0])


def test_the_designed_deepspeed_configurations_are_shipped() -> None:
    assert {"zero0", "zero1", "zero2", "zero3", "zero3_offload"} <= set(CONFIGS)


@pytest.mark.parametrize("precision, bf16", [("fp32", False), ("bf16", True)])
def test_precision_decides_what_deepspeed_computes_in(precision: str, bf16: bool) -> None:
    config = dataclasses.replace(RECIPES["miras_tiny"](), precision=precision)
    assert deepspeed_config(config)["bf16"]["enabled"] is bf16


def test_a_deepspeed_configuration_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    config = dataclasses.replace(RECIPES["miras_tiny"](), zero=str(file), batch_size=4)
    with pytest.raises(UserError, match=r"--zero .*mine\.json: no such"):
        config_path(config.zero)
    file.write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4}')
    assert deepspeed_config(config)["zero_optimization"]["stage"] == 1
    file.write_text('{"train_micro_batch_size_per_gpu": 2}')
    with pytest.raises(UserError, match=r"train_micro_batch_size_per_gpu is 2 but the run says 4"):
        deepspeed_config(config)
    file.write_text('{"zero_optimization": ')
    with pytest.raises(UserError, match=r"mine\.json: not JSON"):
        deepspeed_config(config)


@pytest.mark.parametrize(
    "name, sequence_length, batch_size",
    [("miras_32k", 32_768, 16), ("miras_64k", 65_536, 8), ("miras_128k", 131_072, 4)],
)
def test_the_guides_numbers(name: str, sequence_length: int, batch_size: int) -> None:
    config = RECIPES[name]()
    assert (config.sequence_length, config.batch_size) == (sequence_length, batch_size)
    assert (config.steps, config.lr, config.save_every) == (50_000, 1e-4, 500)
    assert config.batch_size * config.grad_accum * config.sequence_length * 4 == 2_097_152
    assert config.model.backbone.pretrained == "allenai/OLMo-2-0425-1B"
    assert not config.model.backbone.trainable
    assert config.activation_checkpointing


def test_the_long_recipes_differ_in_length_alone() -> None:
    same = {"recipe": "", "sequence_length": 64, "batch_size": 1, "output_dir": Path("x")}
    configs = [dataclasses.replace(RECIPES[f"miras_{length}k"](), **same) for length in (32, 64, 128)]
    assert configs[0] == configs[1] == configs[2]


def test_the_long_recipes_read_long_documents_alone() -> None:
    config = RECIPES["miras_64k"]()
    assert config.data.min_tokens > config.model.attention.window


def test_the_tiny_recipe_is_sharded_both_ways() -> None:
    config = RECIPES["miras_tiny"]()
    assert (config.parallel.sequence, config.zero, config.report.log_every) == (2, "zero3", 1)
    assert config.model.backbone.pretrained is None and config.model.backbone.trainable


def test_the_recall_recipes_differ_in_the_rule_alone() -> None:
    momentum, delta = RECIPES["miras_recall"](), RECIPES["miras_recall_delta"]()
    assert (momentum.model.memory.rule, delta.model.memory.rule) == ("titans", "delta")
    rule = dataclasses.replace(delta.model, memory=dataclasses.replace(delta.model.memory, rule="titans"))
    assert dataclasses.replace(delta, recipe=momentum.recipe, output_dir=momentum.output_dir, model=rule) == momentum


def test_only_a_memory_can_answer_in_the_recall_recipe() -> None:
    config = RECIPES["miras_recall"]()
    assert config.data.recall.min_gap > config.model.attention.window + config.model.attention.sinks
