"""Dashboards get the same numbers, and a missing one is said in one line."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.dashboards import TensorBoard, WeightsAndBiases
from pipeline.errors import UserError
from pipeline.system import Evaluation


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard itself reads from a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(make_run, record) -> None:
    run = make_run()
    board = TensorBoard(run)
    board.on_step(record(1, metrics={"norm_M": 1.5}))
    board.on_step(record(2, loss=2.25, grad_norm=None, mfu=0.5))
    board.on_evaluation(2, Evaluation({"loss": 2.0, "memory_off/loss": 2.25}))
    board.on_end("finished")
    found = events(run.folder / "tensorboard")
    assert found["train/loss"] == [(1, 2.5), (2, 2.25)]
    assert found["train/lr"] == [(1, pytest.approx(3e-4)), (2, pytest.approx(3e-4))]
    assert found["train/grad_norm"] == [(1, 0.75)]
    assert found["train/mfu"] == [(2, 0.5)]
    assert found["train/tok_s"] == [(1, 4096), (2, 4096)]
    assert found["train/peak_memory"] == [(1, 3 * 2**29), (2, 3 * 2**29)]
    assert found["norm_M"] == [(1, 1.5)]
    assert found["val/loss"] == [(2, 2.0)] and found["val/memory_off/loss"] == [(2, 2.25)]


def test_tensorboard_shows_a_loss_that_is_not_finite(make_run, record) -> None:
    run = make_run()
    board = TensorBoard(run)
    board.on_step(record(1, loss=math.nan))
    board.on_end("finished")
    ((_, value),) = events(run.folder / "tensorboard")["train/loss"]
    assert math.isnan(value)


def test_a_resume_replaces_the_steps_that_are_run_again(make_run, record) -> None:
    first = TensorBoard(make_run())
    for step in (1, 2, 3):
        first.on_step(record(step, loss=float(step)))
    first.on_end("failed")
    run = make_run(step=1)
    second = TensorBoard(run)
    second.on_step(record(2, loss=20.0))
    second.on_end("finished")
    assert events(run.folder / "tensorboard")["train/loss"] == [(1, 1.0), (2, 20.0)]


def test_weights_and_biases_that_is_not_installed_is_said_with_the_mend(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--report\.wandb needs the wandb package: pip install") as caught:
        WeightsAndBiases(make_run(report__wandb="mnemos"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status, code", [("finished", 0), ("failed", 1)])
def test_weights_and_biases_gets_the_run(
    make_run, record, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    calls: list[tuple[str, Any]] = []
    session = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", (values, step))),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        return session

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = make_run(report__wandb="mnemos")
    callback = WeightsAndBiases(run)
    callback.on_step(record(3, grad_norm=None))
    callback.on_evaluation(3, Evaluation({"loss": 2.0}))
    callback.on_end(status)
    (_, options), (_, (train, step)), (_, (val, _)), (_, ended) = calls
    assert options["project"] == "mnemos" and options["config"]["steps"] == run.config.steps
    assert step == 3 and train["train/loss"] == 2.5 and "train/grad_norm" not in train
    assert val == {"val/loss": 2.0}
    assert ended == code
    identity = options["id"]
    for step, same in ((0, False), (3, True)):
        calls.clear()
        run.progress.step = step
        WeightsAndBiases(run)
        assert (calls[0][1]["id"] == identity) == same, "a resume and the next phase go on with the same run"
        identity = calls[0][1]["id"]
