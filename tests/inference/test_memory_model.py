"""A checkpoint with memory as `load` gives it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.inference import generate, load
from pipeline.lm.config import AttentionConfig
from pipeline.systems.miras.causal_lm import MnemosForCausalLM
from tests.inference.checkpoints import checkpoint, miras
from tests.lm.families import save_decoder


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(64, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    system, trained = checkpoint(tmp_path / "checkpoint-5", miras())
    model, tokenizer = load(tmp_path / "checkpoint-5")
    assert isinstance(model, MnemosForCausalLM) and not model.training and tokenizer.name == "bytes"
    weights = dict(trained.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.model.named_parameters())
    ids = ids_of(40)
    decoder = system.decoder(trained)  # type: ignore[attr-defined]
    assert_close(model(ids).logits, decoder.logits(ids, decoder.empty(2)), rtol=1e-5, atol=1e-5)
    assert load(tmp_path / "checkpoint-5", dtype=torch.float64).model(ids).logits.dtype == torch.float64
    assert len(generate(model, tokenizer, ["one", "another"], max_new_tokens=3)) == 2


def test_a_prompt_longer_than_full_attention_takes_is_refused(tmp_path: Path) -> None:
    config = miras()
    full = dataclasses.replace(config.model, attention=AttentionConfig("full"))  # type: ignore[call-arg]
    checkpoint(tmp_path / "checkpoint-5", replace(config, model=full, sequence_length=32))
    model, tokenizer = load(tmp_path / "checkpoint-5")
    with pytest.raises(UserError, match=r"40 tokens.* 32"):
        generate(model, tokenizer, "a" * 40, max_new_tokens=1)


def test_a_checkpoint_without_all_that_was_trained_is_refused(tmp_path: Path) -> None:
    """It would be random there."""
    checkpoint(tmp_path / "checkpoint-5", miras(), without=("memory.1.q_proj.weight", "backbone.model.norm.weight"))
    with pytest.raises(UserError, match=r"lacks 2 of the weights that were trained, such as backbone\.model\.norm\.w"):
        load(tmp_path / "checkpoint-5")


def test_a_frozen_backbone_has_to_be_the_one_of_the_training(tmp_path: Path) -> None:
    base = save_decoder("olmo2", tmp_path / "base")
    checkpoint(tmp_path / "checkpoint-5", miras(pretrained=str(base)))
    model = load(tmp_path / "checkpoint-5").model
    weights = load_file(base / "model.safetensors")
    assert torch.equal(model.model.backbone.lm_head.weight, weights["lm_head.weight"])
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="was trained on other frozen weights than"):
        load(tmp_path / "checkpoint-5")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"base: holds neither .*model\.safetensors"):
        load(tmp_path / "checkpoint-5")
