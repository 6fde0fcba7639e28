"""Paths that begin with a user's home."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.files.home import expanded


def test_a_home_is_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/a") == Path("/somewhere/a") and expanded(Path("a/~")) == Path("a/~")
    assert expanded("~nosuchuser/a") == Path("~nosuchuser/a")
