"""What language-model systems share: the bytes that a token id stands for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.recipes.olmo import olmo_1b, olmo_tiny
from pipeline.system import create_system
from pipeline.systems.olmo.system import OlmoSystem


def lengths(config: RunConfig) -> list[int] | None:
    system = create_system(config)
    assert isinstance(system, OlmoSystem)
    found = system.byte_lengths()
    return None if found is None else found.tolist()


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    """Ids without a sidecar."""
    path = tmp_path / "a.npy"
    np.zeros(64, "<u2").tofile(path)
    return str(path)


def test_bytes_stand_for_themselves_and_rows_that_pad_the_vocabulary_for_nothing() -> None:
    assert lengths(olmo_tiny()) == [1] * 256 + [0] * 4


@pytest.mark.parametrize("name", ["bytes", "nobody/has-this-tokenizer", "./not/there"])
def test_ids_of_token_files_stand_for_nothing_known_without_their_tokenizer(name: str, token_file: str) -> None:
    """A run on OLMo's files needs no tokenizer: bits per byte are left out."""
    config = replace(olmo_1b(), data__tokens=(token_file,), data__tokenizer=name)
    assert lengths(config) is None


def test_token_files_of_bytes_have_their_lengths(token_file: str) -> None:
    config = replace(olmo_tiny(), data__tokens=(token_file,))
    assert lengths(config) == [1] * 256 + [0] * 4


def test_the_tokenizer_is_that_of_the_data(token_file: str) -> None:
    assert create_system(olmo_tiny()).tokenizer().name == "bytes"
    assert create_system(replace(olmo_tiny(), data__tokens=(token_file,))).tokenizer().name == "bytes"
    # What a checkpoint knows of the files, which are not here.
    system = create_system(replace(olmo_tiny(), data__tokens=("gone.npy",)))
    assert system.tokenizer({"": ""}).name == "bytes"
    with pytest.raises(UserError, match="nothing says which tokenizer made the token files"):
        create_system(replace(olmo_1b(), data__tokens=("gone.npy",), data__tokenizer="bytes")).tokenizer({"": ""})
    with pytest.raises(UserError, match="trained on the recall task, whose ids stand for no text"):
        create_system(miras_recall()).tokenizer()


def test_a_text_is_as_long_as_those_of_training_or_of_any_length_through_a_carry() -> None:
    assert create_system(olmo_tiny()).text_limit() == 256
    windowed = miras_tiny()
    assert create_system(windowed).text_limit() is None
    model: Any = windowed.model
    full = dataclasses.replace(model, attention=dataclasses.replace(model.attention, kind="full"))
    assert create_system(replace(windowed, model=full)).text_limit() == 1024
