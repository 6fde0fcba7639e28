"""A record is the mean over labels of everything since the last one, and MFU is said only where it is known."""

from __future__ import annotations

import time
import types

import pytest
import torch
from torch import Tensor

from pipeline.config import replace
from pipeline.engine import StepResult
from pipeline.host import hardware
from pipeline.meter import Meter
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Run
from pipeline.system import Flops, Phase, StepOutput

DONE = StepResult(grad_norm=0.5, skipped=False, lr=1e-3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Time that stands still until it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


@pytest.fixture
def run(clock, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of 4 x 1024 tokens a step on one CPU rank, a thousand FLOPs a token."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    system = types.SimpleNamespace(
        flops=lambda length, phase: Flops(400.0, 600.0), token_term="cross_entropy", token_weight=1.0
    )
    config = replace(miras_tiny(), parallel__sequence=1)
    return Run(config, Topology(), torch.device("cpu"), system, Phase("train", 1, ()), None, None, {})  # type: ignore[arg-type]


def output(loss: float, **metrics: tuple[float, float]) -> StepOutput:
    return StepOutput(
        {"cross_entropy": torch.tensor(loss, requires_grad=True)},
        {},
        {name: (torch.tensor(value), torch.tensor(count)) for name, (value, count) in metrics.items()},
    )


def counts(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_the_loss_is_the_mean_over_labels_of_every_micro_batch_and_step(run: Run, clock) -> None:
    meter = Meter(run)
    for losses, labels in (((10.0, 20.0), 12), ((3.0,), 3)):
        meter.add_counts(counts(cross_entropy=labels))
        for loss in losses:
            meter.add(output(loss))
    clock(2.0)
    record = meter.record(2, DONE)
    assert record.loss == pytest.approx(33 / 15)
    assert (record.step, record.lr, record.grad_norm) == (2, 1e-3, 0.5)
    assert (record.tokens, run.progress.tokens) == (15, 15)


def test_speed_and_time_are_of_the_steps_since_the_last_record(run: Run, clock) -> None:
    meter = Meter(run)
    for steps, seconds, elapsed in ((2, 4.0, 4.0), (1, 1.0, 5.0)):
        for _ in range(steps):
            meter.add_counts(counts(cross_entropy=10))
            meter.add(output(1.0))
        clock(seconds)
        record = meter.record(steps, DONE)
        assert record.tok_s == pytest.approx(steps * 4 * 1024 / seconds)
        assert record.elapsed == run.progress.elapsed == elapsed


def test_nothing_is_left_over_from_the_last_record(run: Run, clock) -> None:
    meter = Meter(run)
    for loss in (100.0, 1.0):
        meter.add_counts(counts(cross_entropy=1))
        meter.add(output(loss, norm_M=(loss, 2)))
        clock(1.0)
        record = meter.record(1, DONE)
        assert (record.loss, record.metrics) == (loss, {"norm_M": loss / 2})


def test_a_metric_is_its_sum_over_its_count(run: Run, clock) -> None:
    meter = Meter(run)
    meter.add_counts(counts(cross_entropy=1))
    meter.add(output(1.0, **{"memory/alpha": (3.0, 4), "norm_M": (8.0, 2)}))
    meter.add(output(1.0, **{"memory/alpha": (1.0, 4), "norm_M": (4.0, 1)}))
    clock(1.0)
    assert meter.record(1, DONE).metrics == {"memory/alpha": 0.5, "norm_M": 4.0}


def test_terms_are_added_up_and_said_one_by_one(run: Run, clock) -> None:
    meter = Meter(run)
    meter.add_counts(counts(cross_entropy=4, regulariser=2))
    meter.add(StepOutput({"cross_entropy": torch.tensor(8.0), "regulariser": torch.tensor(1.0)}, {}))
    clock(1.0)
    record = meter.record(1, DONE)
    assert record.loss == pytest.approx(2.5)
    assert record.tokens == 4, "the modules of a regulariser are no tokens"
    assert record.metrics == {"loss/cross_entropy": 2.0, "loss/regulariser": 0.5}
    assert record.token_loss == 2.0


@pytest.mark.parametrize("weight, token_loss", [(1.0, 2.0), (0.5, 4.0), (0.0, None)])
def test_the_loss_of_tokens_is_without_its_weight(run: Run, clock, weight: float, token_loss: float | None) -> None:
    """Of one term alone too; of weight 0 nothing was measured."""
    run.system.token_weight = weight
    meter = Meter(run)
    for others in ({}, {"kl": torch.tensor(3.0)}):
        meter.add_counts(counts(cross_entropy=4, **dict.fromkeys(others, 1)))
        meter.add(StepOutput({"cross_entropy": torch.tensor(8.0), **others}, {}))
        clock(1.0)
        assert meter.record(1, DONE).token_loss == token_loss


def test_a_stopping_rule_gets_the_numbers_of_the_last_step_alone(run: Run, clock) -> None:
    run.phase = Phase("train", 9, (), until=lambda numbers: False)
    meter = Meter(run)
    for loss, metric in ((8.0, 1.0), (4.0, 3.0)):
        meter.add_counts({"cross_entropy": 2})
        for _ in range(2):
            one = torch.ones(())
            meter.add(StepOutput({"cross_entropy": torch.tensor(loss)}, {}, {"share": (metric * one, one)}))
    assert meter.numbers() == {"loss": 4.0, "share": 3.0, "tokens": 4}
    clock(1.0)
    record = meter.record(2, DONE)
    assert (record.loss, record.metrics, record.tokens) == (6.0, {"share": 2.0}, 4)


def test_sums_keep_their_precision_over_many_micro_batches(run: Run, clock) -> None:
    meter = Meter(run)
    meter.add_counts(counts(cross_entropy=1))
    for _ in range(1000):
        meter.add(output(2.0**24 + 2))
    clock(1.0)
    assert meter.record(1, DONE).loss == 1000 * (2.0**24 + 2)


def test_no_graph_is_held(run: Run) -> None:
    meter = Meter(run)
    meter.add(output(1.0))
    assert not any(value.requires_grad for value in meter.sums.values())


def test_a_skipped_update_has_no_gradient_norm(run: Run, clock) -> None:
    meter = Meter(run)
    meter.add_counts(counts(cross_entropy=1))
    meter.add(output(float("nan")))
    clock(1.0)
    record = meter.record(1, StepResult(float("nan"), True, 1e-3, 512.0, True))
    assert record.loss_scale == 512.0
    assert record.grad_norm is None
    assert record.loss != record.loss


def mfu(run: Run, clock, seconds: float) -> float | None:
    meter = Meter(run)
    meter.add_counts(counts(cross_entropy=1))
    meter.add(output(1.0))
    clock(seconds)
    return meter.record(1, DONE).mfu


def test_mfu_is_unknown_on_a_device_whose_peak_is_unknown(run: Run, clock) -> None:
    assert mfu(run, clock, 1.0) is None


def test_mfu_is_the_share_of_a_stated_peak_and_never_above_one(run: Run, clock) -> None:
    run.config = replace(run.config, report__peak_tflops=4096e-9 * 2)
    assert mfu(run, clock, 1.0) == pytest.approx(0.5)
    assert mfu(run, clock, 0.25) is None


def test_mfu_is_of_all_devices(run: Run, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run.config = replace(run.config, report__peak_tflops=4096e-9)
    run.topology = Topology(world=4, sequence=4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op=None: None)
    assert mfu(run, clock, 1.0) == pytest.approx(0.25)


def test_memory_is_what_the_process_has_held_at_most(run: Run, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.meter.peak_memory", lambda: 2**40 + 1)
    meter = Meter(run)
    meter.add_counts(counts(cross_entropy=1))
    meter.add(output(1.0))
    clock(1.0)
    assert meter.record(1, DONE).peak_memory == 2**40 + 1
    assert hardware.peak_memory() > 0


def test_the_wait_for_data_is_a_share_of_the_time_since_the_last_record(run: Run, clock) -> None:
    meter = Meter(run)
    for seconds, waits, share in ((2.0, (0.25, 0.25), 0.25), (4.0, (), 0.0)):
        meter.add_counts(counts(cross_entropy=1))
        meter.add(output(1.0))
        for wait in waits:
            meter.add_wait(wait)
        clock(seconds)
        assert meter.record(1, DONE).data_wait == pytest.approx(share)
