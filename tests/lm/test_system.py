"""What language-model systems share: the bytes that a token id stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RunConfig, replace
from pipeline.recipes.olmo import olmo_1b, olmo_tiny
from pipeline.system import create_system
from pipeline.systems.olmo.system import OlmoSystem


def lengths(config: RunConfig) -> list[int] | None:
    system = create_system(config)
    assert isinstance(system, OlmoSystem)
    found = system.byte_lengths()
    return None if found is None else found.tolist()


def test_bytes_stand_for_themselves_and_rows_that_pad_the_vocabulary_for_nothing() -> None:
    assert lengths(olmo_tiny()) == [1] * 256 + [0] * 4


@pytest.mark.parametrize("name", ["bytes", "nobody/has-this-tokenizer", "./not/there"])
def test_ids_of_token_files_stand_for_nothing_known_without_their_tokenizer(name: str, tmp_path: Path) -> None:
    """A run on OLMo's files needs no tokenizer: bits per byte are left out."""
    config = replace(olmo_1b(), data__tokens=(str(tmp_path / "a.npy"),), data__tokenizer=name)
    assert lengths(config) is None


def test_token_files_of_bytes_have_their_lengths(tmp_path: Path) -> None:
    config = replace(olmo_tiny(), data__tokens=(str(tmp_path / "a.npy"),))
    assert lengths(config) == [1] * 256 + [0] * 4
