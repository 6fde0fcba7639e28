"""What is here needs a GPU, and says so once where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or torch.cuda.is_available():
        return
    if any(Path(__file__).parent in item.path.parents for item in session.items):
        raise pytest.UsageError("tests/gpu needs a GPU that torch can use, and there is none: see `mnemos doctor`")
