"""A given embedding and the tokenizer of a run: its rows, its width, its own tokenizer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.data.build import list_documents
from pipeline.systems.cvfp.data.embedding import rows_of_embedding
from tests.systems.cvfp.data.harness import json_lines, run

bpe_folder = pytest.importorskip("tests.data.conftest").bpe_folder
BYTES = load_tokenizer("bytes")


def weights(folder: Path, rows: int, width: int = 16, name: str = "transformer.wte.weight") -> Path:
    """A model's folder without a tokenizer."""
    folder.mkdir(exist_ok=True)
    save_file({name: torch.zeros(rows, width)}, folder / "model.safetensors")
    return folder


def of(folder: Path | None, width: int = 16) -> CvfpConfig:
    return CvfpConfig(width=width, embedding=None if folder is None else str(folder))


def test_rows_are_those_of_the_embedding_or_the_tokenizers_ids(tmp_path: Path) -> None:
    assert rows_of_embedding(of(None), BYTES) == 260
    assert rows_of_embedding(of(weights(tmp_path / "model", 260)), BYTES) == 260
    assert rows_of_embedding(of(weights(tmp_path / "padded", 320)), BYTES) == 320


def test_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 260 ids and --model.embedding .* 200 rows: name the tokenizer"):
        rows_of_embedding(of(weights(tmp_path / "small", 200)), BYTES)
    with pytest.raises(UserError, match=r"has 260 ids and --model.embedding .* 50,257 rows"):
        rows_of_embedding(of(weights(tmp_path / "large", 50257, 1), width=1), BYTES)
    with pytest.raises(UserError, match=r"has 260 ids and --model.embedding .* 324 rows: name the tokenizer"):
        rows_of_embedding(of(weights(tmp_path / "other", 324)), BYTES)
    with pytest.raises(UserError, match=r"16 dimensions and --model\.width is 32: give 16"):
        rows_of_embedding(of(weights(tmp_path / "model", 260), width=32), BYTES)
    with pytest.raises(UserError, match="no input embedding among its tensors"):
        rows_of_embedding(of(weights(tmp_path / "none", 260, name="head.weight")), BYTES)
    with pytest.raises(UserError, match="no folder of a model"):
        rows_of_embedding(of(tmp_path / "missing"), BYTES)


def test_the_tokenizer_is_the_models_own(tmp_path: Path, bpe_folder: Path) -> None:
    """One of as many ids too: they stand for other rows."""
    own = load_tokenizer(str(bpe_folder))
    model = tmp_path / "model"
    shutil.copytree(bpe_folder, model)
    weights(model, own.vocab_size)
    assert rows_of_embedding(of(model), own) == own.vocab_size
    with pytest.raises(UserError, match=rf"bytes is not the tokenizer of .*: give --data.tokenizer {model}") as caught:
        rows_of_embedding(of(model), BYTES)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_loaded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = weights(tmp_path / "model", 260)
    (model / "tokenizer.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert rows_of_embedding(of(model), BYTES) == 260
    (record,) = [record for record in caplog.records if record.name.startswith("pipeline")]
    assert "only the number of ids is compared" in record.getMessage() and "\n" not in record.getMessage()


def test_documents_know_the_rows(tmp_path: Path) -> None:
    corpus = json_lines(tmp_path / "corpus.jsonl", [f"text {index}" for index in range(20)])
    model = weights(tmp_path / "padded", 320)
    assert list_documents(run(tmp_path, corpus, model={"embedding": str(model)})).vocab == 320
    with pytest.raises(UserError, match=r"--data\.tokenizer bytes has 260 ids"):
        list_documents(run(tmp_path, corpus, model={"embedding": str(weights(tmp_path / "small", 200))}))
