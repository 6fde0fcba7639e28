"""Gradient norms far above their running median are reported with the batch that made them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.callbacks import Callback
from pipeline.callbacks.progress import ProgressLines
from pipeline.callbacks.spikes import SpikeFile
from pipeline.config import replace
from pipeline.engine import StepResult
from pipeline.errors import UserError
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Run
from pipeline.system import StepOutput
from pipeline.update_watch import LEAST, WINDOW, GradientSpikes, UpdateWatch
from tests.checkpoint.small_runs import a_run

POSITION = {
    "streams": {"0": {"epoch": 0, "position": 4, "read": "ab", "name": "one.txt"}, "1": {"epoch": 1, "position": 5}},
    "fingerprint": {},
}
OUTPUTS = [StepOutput({"loss": torch.tensor(1.0)}, {})]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=3 * WINDOW), st.sampled_from([0.0, 1.5, 4.0]))
def test_a_spike_is_a_multiple_of_the_median_before_it(norms: list[float], factor: float) -> None:
    spikes = GradientSpikes(factor)
    for index, norm in enumerate(norms):
        before = norms[max(0, index - WINDOW) : index]
        median = statistics.median(before) if len(before) >= LEAST else 0.0
        wanted = median if factor and 0 < factor * median < norm else None
        assert spikes.look(norm) == wanted


class Noting(Callback):
    def __init__(self) -> None:
        self.spikes: list[Any] = []
        self.skips: list[int] = []

    def on_spike(self, step: int, grad_norm: float, median: float, batch: dict[str, Any]) -> None:
        self.spikes.append((step, grad_norm, median, batch))

    def on_skip(self, step: int, in_a_row: int, batch: dict[str, Any]) -> None:
        self.skips.append(step)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return a_run(tmp_path, step=0)


def result(norm: float) -> StepResult:
    return StepResult(norm, norm != norm, 1e-3)


def test_a_spike_is_reported_once_with_where_its_batch_began(run: Run) -> None:
    noting = Noting()
    watch = UpdateWatch(run, [noting])
    norms = [1.0] * LEAST + [9.0, 1.0, torch.nan, 1.0]
    for step, norm in enumerate(norms, start=1):
        run.progress.step = step
        watch.after(result(norm), OUTPUTS, POSITION)
    batch = {"0": {"epoch": 0, "position": 4, "name": "one.txt"}, "1": {"epoch": 1, "position": 5}}
    assert noting.spikes == [(LEAST + 1, 9.0, 1.0, batch)]
    assert noting.skips == [LEAST + 3] and run.progress.skipped == 1 and run.progress.skipped_in_a_row == 0


def test_a_factor_of_0_reports_none(run: Run) -> None:
    run.config = replace(run.config, report__spike_factor=0.0)
    noting = Noting()
    watch = UpdateWatch(run, [noting])
    for norm in [1.0] * 40 + [1e9]:
        watch.after(result(norm), OUTPUTS, POSITION)
    assert not noting.spikes
    with pytest.raises(UserError, match=r"--report\.spike-factor is -1"):
        replace(miras_tiny(), report__spike_factor=-1.0)


def test_the_file_and_the_log_name_the_step(run: Run) -> None:
    for callback in (SpikeFile(run), ProgressLines(run)):
        callback.on_spike(17, 9.0, 1.5, {"0": {"epoch": 0}})
    (line,) = (run.folder / "spikes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 17, "grad_norm": 9.0, "median": 1.5, "batch": {"0": {"epoch": 0}}}
    assert "step 17: gradient norm 9, 6.0 times its running median" in (run.folder / "training.log").read_text()


def test_a_resume_drops_the_lines_of_steps_that_are_run_again(run: Run) -> None:
    path = run.folder / "spikes.jsonl"
    path.write_text('{"step": 3}\n{"step": 5}\nnot a line\n[1]\n{"step": 7}\n{"st')
    run.progress.step = 5
    SpikeFile(run).on_start()
    assert path.read_text() == '{"step": 3}\n{"step": 5}\n'
