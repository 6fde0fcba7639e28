"""Paths as users give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.files.given_path import expanded, is_gguf, is_path


def test_a_home_is_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/a") == Path("/somewhere/a") and expanded(Path("a/~")) == Path("a/~")
    assert expanded("~nosuchuser/a") == Path("~nosuchuser/a")


@pytest.mark.parametrize("name", ["./a", "../a", "/a", "~/a", "~", ".", "a/b/c", "a/b/c@v1"])
def test_only_a_path_looks_so(name: str) -> None:
    assert is_path(name)


@pytest.mark.parametrize("name", ["a", "a/b", "a/b@v1", "a/b@refs/pr/1", "a.b/c-d", "bytes"])
def test_a_name_of_the_hub_does_not(name: str) -> None:
    assert not is_path(name)


def test_a_gguf_file_is_known_by_its_ending() -> None:
    assert is_gguf("a/b.gguf") and is_gguf("B.GGUF") and not is_gguf("gguf") and not is_gguf("a.gguf/b")
