"""Tests that need a GPU say so once where there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gpu import conftest

HERE = Path(__file__).resolve().parent


def session(*names: str, collectonly: bool = False) -> SimpleNamespace:
    items = [SimpleNamespace(path=HERE / name) for name in names]
    return SimpleNamespace(items=items, config=SimpleNamespace(option=SimpleNamespace(collectonly=collectonly)))


def test_a_selected_test_without_a_gpu_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="tests/gpu needs a GPU that torch can use, and there is none"):
        conftest.pytest_collection_finish(session("test_cli.py", "gpu/test_lost_device.py"))
    conftest.pytest_collection_finish(session("test_cli.py"))
    conftest.pytest_collection_finish(session("gpu/test_lost_device.py", collectonly=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    conftest.pytest_collection_finish(session("gpu/test_lost_device.py"))
