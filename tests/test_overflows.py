"""An overflow of the loss scale is a skipped update that ends no run; other skipped updates count towards its end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.callbacks import Callback
from pipeline.config import replace
from pipeline.engine import StepResult
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Run
from pipeline.skipped_updates import count_overflow, count_skipped
from pipeline.system import StepOutput

LIMIT = 3
OUTPUT = StepOutput({"cross_entropy": torch.tensor(math.nan)}, {}, {})


class Heard(Callback):
    def __init__(self) -> None:
        self.skips: list[int] = []
        self.overflows: list[float] = []

    def on_skip(self, step: int, in_a_row: int, batch: dict[str, Any]) -> None:
        self.skips.append(in_a_row)

    def on_overflow(self, step: int, loss_scale: float) -> None:
        self.overflows.append(loss_scale)


@pytest.fixture
def run() -> Run:
    config = replace(miras_tiny(), parallel__sequence=1, optimizer__max_skipped=LIMIT)
    return Run(config, Topology(), torch.device("cpu"), None, None, None, None, {})  # type: ignore[arg-type]


def skip(run: Run, heard: Heard, scale: float | None = None) -> None:
    if scale is not None:
        count_overflow(run, StepResult(math.nan, True, 1e-3, scale, True), [heard])
    else:
        count_skipped(run, [OUTPUT], {}, [heard])


def test_overflows_of_a_scale_that_is_lowered_end_no_run(run: Run) -> None:
    heard = Heard()
    scales = [2.0**power for power in range(16, 0, -1)]
    for scale in scales:
        skip(run, heard, scale)
    assert heard.overflows == scales and heard.skips == []
    assert (run.progress.skipped, run.progress.skipped_in_a_row) == (16, 0)


def test_other_skips_do(run: Run) -> None:
    heard = Heard()
    for _ in range(LIMIT - 1):
        skip(run, heard)
    with pytest.raises(UserError, match=f"{LIMIT} updates in a row"):
        skip(run, heard)
    assert heard.skips == [1, 2, 3] and heard.overflows == []
    assert (run.progress.skipped, run.progress.skipped_in_a_row) == (LIMIT, LIMIT)


def test_an_overflow_between_two_skips_neither_counts_nor_resets(run: Run) -> None:
    heard = Heard()
    skip(run, heard)
    skip(run, heard, 2.0)
    skip(run, heard)
    assert heard.skips == [1, 2]
