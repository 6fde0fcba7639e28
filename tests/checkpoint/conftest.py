from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.run import Run
from tests.checkpoint.small_runs import a_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    return partial(a_run, tmp_path)
