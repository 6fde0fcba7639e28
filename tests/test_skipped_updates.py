"""Where the batch of a skipped update began: by stream, or the one position of a loader without streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.callbacks import Callback
from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.run import Run
from pipeline.skipped_updates import count_skipped
from pipeline.system import StepOutput
from tests.checkpoint.small_runs import a_run

FINITE, NAN = StepOutput({"loss": torch.tensor(1.0)}, {}), StepOutput({"loss": torch.tensor(torch.nan)}, {})
STREAMS = {"streams": {str(i): {"epoch": 0, "position": i, "read": "abc"} for i in range(4)}, "fingerprint": {}}


class Noting(Callback):
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_skip(self, step: int, in_a_row: int, batch: dict[str, Any]) -> None:
        self.found = batch


def found(run: Run, outputs: list[StepOutput], position: dict[str, Any]) -> dict[str, Any]:
    noting = Noting()
    count_skipped(run, outputs, position, [noting])
    return noting.found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of two micro-batches of two rows."""
    run = a_run(tmp_path, step=7)
    run.config = replace(run.config, grad_accum=2)
    return run


def test_streams_with_a_loss_that_is_not_finite_are_named(run: Run) -> None:
    assert found(run, [FINITE, NAN], STREAMS) == {
        "2": {"epoch": 0, "position": 2},
        "3": {"epoch": 0, "position": 3},
    }


def test_all_streams_are_named_when_only_a_gradient_was_not_finite(run: Run) -> None:
    assert found(run, [FINITE, FINITE], STREAMS).keys() == {"0", "1", "2", "3"}


def test_a_loader_without_streams_says_where_it_was(run: Run) -> None:
    position = {"epoch": 2, "offset": 40, "fingerprint": {"content": "abc"}}
    assert found(run, [NAN, FINITE], position) == {"epoch": 2, "offset": 40}


def test_too_many_in_a_row_end_the_run(run: Run) -> None:
    run.config = replace(run.config, optimizer__max_skipped=2)
    found(run, [NAN, NAN], STREAMS)
    assert (run.progress.skipped, run.progress.skipped_in_a_row) == (1, 1)
    with pytest.raises(UserError, match=r"step 7: 2 updates in a row .*: lower --lr"):
        found(run, [NAN, NAN], STREAMS)
