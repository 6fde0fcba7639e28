"""A model that transformers has no class of is read and written with as the others are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main
from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.inference import generate, load
from pipeline.inference.identity import model_hash
from pipeline.recipes.cvfp import cvfp_tiny
from tests.inference.checkpoints import checkpoint

PROMPT = "The library"


def config(**changes: Any) -> RunConfig:
    recipe: Any = cvfp_tiny()
    model = dataclasses.replace(recipe.model, width=16, layers=2, vocab=257, **changes)
    return replace(recipe, model=model, data=dataclasses.replace(recipe.data, tokenizer="bytes"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint-5", config())
    return tmp_path / "run"


def test_the_command_writes_what_the_logits_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(run, dtype=torch.float64)
    ids = [int(token) for token in tokenizer.encode(PROMPT)]
    wanted: list[int] = []
    for _ in range(6):
        logits = model(torch.tensor([ids + wanted])).logits
        assert logits.shape == (1, len(ids + wanted), 257) and logits.dtype == torch.float64
        wanted.append(int(logits[0, -1].argmax()))
    assert generate(model, tokenizer, PROMPT, max_new_tokens=6, temperature=0.0) == tokenizer.decode(wanted)
    state = run / "state.safetensors"
    flags = ["--temperature", "0", "--dtype", "float64"]
    assert main(["generate", str(run), "--prompt", PROMPT, "--max-new-tokens", "6", *flags]) == 0
    whole = capsys.readouterr().out
    assert whole == tokenizer.decode(wanted) + "\n"
    assert (
        main(["generate", str(run), "--prompt", PROMPT, "--max-new-tokens", "0", "--save-state", str(state), *flags])
        == 0
    )
    assert main(["generate", str(run), "--state", str(state), "--max-new-tokens", "6", *flags]) == 0
    assert capsys.readouterr().out == whole


def test_its_hash_is_of_its_weights(run: Path) -> None:
    one, other = load(run).model, load(run).model
    assert model_hash(one) == model_hash(other)
    with torch.no_grad():
        other.model.blocks[0].linear.weight[0, 0] += 1e-3
    assert model_hash(one) != model_hash(other)


def test_a_run_that_trained_no_head_writes_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-5", config(test=True))
    with pytest.raises(UserError, match="trained no head"):
        load(tmp_path / "checkpoint-5")
