"""The config refuses what cannot run, in one line that names the flag."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from pipeline.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, replace
from pipeline.errors import UserError
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.systems.miras.config import MemoryConfig


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(recipe="none", model=ModelConfig(), steps=10, batch_size=2, sequence_length=64, lr=1e-3)


@pytest.mark.parametrize(
    "flag, changes",
    [
        ("--steps", {"steps": -1}),
        ("--batch-size", {"batch_size": 0}),
        ("--sequence-length", {"sequence_length": 0}),
        ("--grad-accum", {"grad_accum": 0}),
        ("--lr", {"lr": 0.0}),
        ("--lr", {"lr": float("nan")}),
        ("--parallel.sequence", {"parallel__sequence": 0}),
        ("--keep", {"keep": 0}),
        ("--keep-every", {"keep_every": -1}),
        ("--report.plot-every", {"report__plot_every": -1}),
        ("--report.log-every", {"report__log_every": 0}),
        ("--evaluation.steps", {"evaluation__steps": 0}),
        ("--save-every", {"save_every": -1}),
        ("--eval-every", {"eval_every": -1}),
        ("--warmup-steps", {"warmup_steps": -1}),
        ("--weight-decay", {"weight_decay": -0.1}),
        ("--clip", {"clip": -1.0}),
        ("--profile", {"profile": -1}),
        ("--data.min-tokens", {"data__min_tokens": -1}),
        ("--stop-after", {"stop_after": 0}),
        ("--evaluation.patience", {"evaluation__patience": -1, "evaluation__best": "loss"}),
        ("--data.holdout", {"data__holdout": 0.0}),
        ("--data.holdout", {"data__holdout": 1.0}),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named_with_its_flag(config: RunConfig, flag: str, changes: dict) -> None:
    value = next(iter(changes.values()))
    with pytest.raises(UserError) as refusal:
        replace(config, **changes)
    message = str(refusal.value)
    assert message.startswith(f"{flag} is {value}: give ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "flag, changes",
    [
        ("--weight-decay", {"weight_decay": float("nan")}),
        ("--clip", {"clip": float("nan")}),
        ("--parallel.timeout-minutes", {"parallel__timeout_minutes": 0.0}),
        ("--optimizer.betas", {"optimizer__betas": (0.9, 1.0)}),
        ("--optimizer.betas", {"optimizer__betas": (-0.1, 0.9)}),
        ("--optimizer.eps", {"optimizer__eps": -1e-8}),
        ("--optimizer.min-lr-ratio", {"optimizer__min_lr_ratio": -0.1}),
        ("--optimizer.min-lr-ratio", {"optimizer__min_lr_ratio": 1.1}),
        ("--optimizer.max-skipped", {"optimizer__max_skipped": 0}),
        ("--optimizer.ema-decay", {"optimizer__ema_decay": 1.0}),
        ("--optimizer.ema-decay", {"optimizer__ema_decay": -0.5}),
        ("--evaluation.patience 2: nothing says what is better", {"evaluation__patience": 2}),
        ("--evaluation.batch-size", {"evaluation__batch_size": -1}),
        ("--report.peak-tflops", {"report__peak_tflops": 0.0}),
    ],
    ids=str,
)
def test_a_value_that_would_end_in_a_traceback_or_in_nonsense_is_refused(
    config: RunConfig, flag: str, changes: dict
) -> None:
    with pytest.raises(UserError, match=flag):
        replace(config, **changes)


@pytest.mark.parametrize(
    "changes", [{"save_every": 0, "eval_every": 0, "warmup_steps": 0, "clip": 0.0, "profile": 0}, {"stop_after": 1}]
)
def test_the_ends_of_a_range_are_accepted(config: RunConfig, changes: dict) -> None:
    for key, value in changes.items():
        assert getattr(replace(config, **changes), key) == value


def test_two_data_sources_are_refused(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"--data\.path and --data\.dataset are both given"):
        replace(config, data=DataConfig(path=("books",), dataset="stdlib"))


def test_a_sequence_that_the_degree_does_not_divide_is_refused(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"--sequence-length 64 is not divisible by --parallel\.sequence 3"):
        replace(config, parallel__sequence=3)
    assert replace(config, parallel__sequence=4).parallel == ParallelConfig(sequence=4)


def test_replace_changes_fields_and_sections_and_leaves_the_rest(config: RunConfig) -> None:
    changed = replace(config, lr=2e-3, data__path=("a", "b"), data__min_tokens=5, report__plots=False)
    assert (changed.lr, changed.data.path, changed.data.min_tokens, changed.report.plots) == (
        2e-3,
        ("a", "b"),
        5,
        False,
    )
    undone = replace(changed, lr=config.lr, data=config.data, report=config.report)
    assert undone == config
    assert config.data == DataConfig()


def test_replace_knows_every_field(config: RunConfig) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        replace(config, nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        replace(config, data__nonsense=1)


def test_a_config_cannot_be_changed_in_place(config: RunConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]


def with_model(section: str, **changes: object) -> RunConfig:
    recipe = miras_tiny()
    model = recipe.model
    return replace(
        recipe, model=dataclasses.replace(model, **{section: dataclasses.replace(getattr(model, section), **changes)})
    )


@pytest.mark.parametrize(
    "section, changes",
    [
        ("backbone", {"width": 130}),
        ("backbone", {"heads": 0}),
        ("backbone", {"ffn": 2**31}),
        ("memory", {"gate_rank": 10**40}),
        ("backbone", {"kv_heads": 3}),
        ("backbone", {"kv_heads": 0}),
        ("backbone", {"layers": 0}),
        ("backbone", {"vocabulary": 0}),
        ("attention", {"window": 0}),
        ("attention", {"sinks": -1}),
        ("memory", {"layers": (1, 4)}),
        ("memory", {"layers": (-1,)}),
        ("memory", {"layers": (1, 1)}),
        ("memory", {"heads": 0}),
        ("memory", {"head_dim": 0}),
        ("memory", {"chunk": 0}),
        ("memory", {"conv": 0}),
        ("memory", {"persistent": -1}),
        ("memory", {"gate_rank": 0}),
        ("memory", {"momentum": 0.0}),
        ("memory", {"momentum": 1.0}),
        ("memory", {"step_size": (0.5, 0.0)}),
        ("memory", {"half_life": (0.0, 1e6)}),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_built_is_refused_by_the_flag_that_says_so(section: str, changes: dict) -> None:
    (field,) = changes
    with pytest.raises(UserError, match=f"--model.{section}.{field.replace('_', '-')}"):
        with_model(section, **changes)


def test_a_model_without_memory_is_allowed() -> None:
    assert with_model("memory", layers=()).model.memory == MemoryConfig(
        layers=(), heads=4, head_dim=32, persistent=4, gate_rank=16, context=64
    )


@pytest.mark.parametrize(
    "field", ["steps", "batch_size", "sequence_length", "grad_accum", "save_every", "warmup_steps"]
)
def test_a_number_that_no_run_can_mean_is_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} is 1000.*: give at most 2147483647"):
        replace(miras_tiny(), **{field: 10**40})


def test_a_config_is_imported_without_torch() -> None:
    code = "import sys, pipeline.config; print(*sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("changes", [{"pairs": 0}, {"keys": 4}, {"queries": 9}, {"max_gap": 10}, {"fillers": 2**31}])
def test_a_recall_task_that_has_no_room_is_refused(changes: dict) -> None:
    recall = miras_recall().data.recall
    (field,) = changes
    with pytest.raises(UserError, match=field):
        dataclasses.replace(recall, **changes)
