"""Bytes per id: of the tokenizer of documents, and of the one that made token files where it is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline.data.byte_lengths import byte_lengths_of
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.tokens.sidecar import Sidecar, sidecar_path
from pipeline.data_config import DataConfig, RecallConfig
from tests.data.tokens.conftest import write


def token_file(path: Path, tokenizer: str | None) -> str:
    name = write(path, range(100))
    if tokenizer is not None:
        made = load_tokenizer(tokenizer)
        sidecar = Sidecar("uint16", 100, 1, made.vocab_size, made.eos_id, tokenizer, made.fingerprint, "")
        sidecar_path(path).write_text(json.dumps(sidecar.to_json()))
    return name


def test_documents_have_the_bytes_of_their_tokenizer_and_tasks_have_none(bpe_folder: Path) -> None:
    found = byte_lengths_of(DataConfig(tokenizer=str(bpe_folder)), None, 10**6)
    assert found is not None and found.equal(load_tokenizer(str(bpe_folder)).byte_lengths())
    assert byte_lengths_of(DataConfig(recall=RecallConfig()), None, 260) is None


def test_token_files_have_those_of_their_sidecar(tmp_path: Path, bpe_folder: Path, caplog) -> None:
    bpe = load_tokenizer(str(bpe_folder)).byte_lengths()
    path = tmp_path / "a.npy"
    name = token_file(path, str(bpe_folder))
    found = byte_lengths_of(DataConfig(tokens=(name,)), None, 10**6)
    assert found is not None and found.equal(bpe), "also where --data.tokenizer is left alone"
    # The folder has moved, and the flag says where to.
    moved = json.loads(sidecar_path(path).read_text()) | {"tokenizer": str(tmp_path / "gone")}
    sidecar_path(path).write_text(json.dumps(moved))
    found = byte_lengths_of(DataConfig(tokens=(name,), tokenizer=str(bpe_folder)), None, 10**6)
    assert found is not None and found.equal(bpe)
    with caplog.at_level(logging.WARNING):
        assert byte_lengths_of(DataConfig(tokens=(name,)), None, 10**6) is None
    assert "no bits per byte: the tokenizer of the token files" in caplog.text
    other = token_file(tmp_path / "b.npy", "bytes")
    held_out = DataConfig(tokens=(name,), held_out_tokens=(other,))
    assert byte_lengths_of(held_out, None, 10**6) is not None, "those of evaluations count"
    with caplog.at_level(logging.WARNING):
        assert byte_lengths_of(DataConfig(tokens=(name, other)), None, 10**6) is None
    assert "several tokenizers" in caplog.text
    found = byte_lengths_of(DataConfig(tokens=(name, other), tokenizer=str(bpe_folder)), None, 10**6)
    assert found is not None and found.equal(bpe), "the flag decides"


@pytest.mark.parametrize("vocabulary, known", [(260, True), (50_304, False)])
def test_without_a_sidecar_bytes_are_those_of_a_small_model_alone(tmp_path: Path, vocabulary: int, known: bool) -> None:
    data = DataConfig(tokens=(token_file(tmp_path / "a.npy", None),))
    assert (byte_lengths_of(data, None, vocabulary) is not None) == known


def test_a_name_on_the_hub_is_not_downloaded(tmp_path: Path) -> None:
    name = token_file(tmp_path / "a.npy", None)
    for tokenizer in ("allenai/not-in-the-cache@main", "./nowhere"):
        assert byte_lengths_of(DataConfig(tokens=(name,), tokenizer=tokenizer), None, 50_304) is None
