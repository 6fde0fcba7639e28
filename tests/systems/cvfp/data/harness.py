"""Runs and documents that the tests of the data share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig
from pipeline.data_config import DataConfig
from pipeline.evaluation_config import EvaluationConfig
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentSet


def run(
    tmp_path: Path,
    *paths: Path,
    length: int = 8,
    model: dict[str, Any] | None = None,
    validation: tuple[str, ...] = (),
    **data: Any,
) -> RunConfig:
    """A run on those files whose cache and outputs are under tmp_path."""
    sizes = CvfpConfig(**{"width": 16, "layers": 1, "data_cache": str(tmp_path / "cache"), **(model or {})})
    section = DataConfig(**{"path": tuple(map(str, paths)), "holdout": 0.3, **data})
    return RunConfig(
        recipe="test",
        model=sizes,
        steps=1,
        lr=1e-3,
        data=section,
        sequence_length=length,
        batch_size=2,
        evaluation=EvaluationConfig(path=validation),
        output_dir=tmp_path / "out",
    )


def json_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def texts_of(documents: DocumentSet, *, held_out: bool) -> list[str]:
    """Of documents in bytes."""
    count = len(documents.ends)
    chosen = range(documents.training, count) if held_out else range(documents.training)
    return [bytes(documents.document(index).tolist()).decode() for index in chosen]


def random_documents(lengths: list[int], training: int, seed: int = 0) -> DocumentSet:
    """Documents of those lengths, of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, 260, sum(lengths)).astype(np.uint32)
    ends = np.cumsum(lengths, dtype=np.int64)
    return DocumentSet(tokens, ends, training, 260, "random", f"{seed} {lengths} {training}", tokenizer="bytes/1")
