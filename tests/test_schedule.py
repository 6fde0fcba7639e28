"""The learning rate is a function of the step alone, from its first update to its last."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import OptimizerConfig, RunConfig, replace
from pipeline.recipes.miras import miras_tiny
from pipeline.schedule import Schedule, schedule_of
from pipeline.schedule import lr_multiple as multiple_of

SHAPES = ("cosine", "linear", "constant")


def make(steps: int, warmup: int, shape: str, floor: float = 0.1) -> RunConfig:
    return replace(
        miras_tiny(), steps=steps, warmup_steps=warmup, optimizer=OptimizerConfig(schedule=shape, min_lr_ratio=floor)
    )


def lr_multiple(config: RunConfig, step: int) -> float:
    """Of a phase without a schedule of its own."""
    return multiple_of(schedule_of(config), config.steps, step)


@st.composite
def schedules(draw: st.DrawFn) -> RunConfig:
    steps = draw(st.integers(1, 400))
    return make(steps, draw(st.integers(0, steps)), draw(st.sampled_from(SHAPES)), draw(st.floats(0, 1)))


@given(schedules())
def test_rises_in_equal_parts_from_the_first_step_then_never_rises(config: RunConfig) -> None:
    warmup = config.warmup_steps
    values = [lr_multiple(config, step) for step in range(1, config.steps + 1)]
    assert values[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert all(later <= earlier for earlier, later in zip(values[max(0, warmup - 1) :], values[warmup:], strict=False))
    assert all(0 <= value <= 1 for value in values)


@given(schedules())
def test_ends_at_the_floor_and_stays_there(config: RunConfig) -> None:
    if config.warmup_steps == config.steps:
        assert lr_multiple(config, config.steps) == 1
    floor = 1.0 if config.optimizer.schedule == "constant" else config.optimizer.min_lr_ratio
    last = config.steps if config.warmup_steps < config.steps else config.steps + 1
    assert lr_multiple(config, last) == pytest.approx(floor, abs=1e-12)
    assert lr_multiple(config, last + 1000) == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_starts_above_zero_and_ends_at_the_peak(shape: str) -> None:
    config = make(100, 10, shape)
    assert lr_multiple(config, 1) == 0.1
    assert lr_multiple(config, 10) == 1.0


@pytest.mark.parametrize(
    "shape, at_the_middle, at_a_quarter", [("cosine", 0.55, 0.86819805), ("linear", 0.55, 0.775), ("constant", 1, 1)]
)
def test_shapes(shape: str, at_the_middle: float, at_a_quarter: float) -> None:
    config = make(110, 10, shape)
    assert lr_multiple(config, 35) == pytest.approx(at_a_quarter)
    assert lr_multiple(config, 60) == pytest.approx(at_the_middle)


def test_without_warm_up_a_constant_rate_is_the_peak_at_once() -> None:
    assert lr_multiple(make(5, 0, "constant"), 1) == 1.0


def test_a_warm_up_rises_from_its_start_to_the_peak() -> None:
    schedule = Schedule(1e-3, warmup_steps=4, warmup_start=0.2, shape="linear", floor=0.5)
    assert [multiple_of(schedule, 6, step) for step in range(1, 7)] == pytest.approx([0.4, 0.6, 0.8, 1.0, 0.75, 0.5])


def test_the_flags_of_a_run_describe_a_schedule() -> None:
    config = replace(make(100, 7, "linear", 0.25), lr=3e-4, optimizer__betas=(0.8, 0.99), optimizer__eps=1e-6)
    expected = Schedule(3e-4, 7, 0.0, "linear", 0.25, (0.8, 0.99), 1e-6)
    assert schedule_of(config) == expected
