"""A decoder as transformers' plain class: the same parameters, and what its config says."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, OlmoForCausalLM

from pipeline.lm.exported import plain_decoder
from tests.export.small_checkpoints import built, dense


def test_parameters_are_shared_and_attention_is_transformers_own() -> None:
    _, model = built(dense("olmo", tied=True, clip_qkv=0.6))
    plain = plain_decoder(model.backbone, trained_length=96, keep_length=False)  # type: ignore[arg-type]
    assert type(plain) is OlmoForCausalLM and not plain.training
    assert plain.config._attn_implementation == "sdpa" and plain.config.clip_qkv == 0.6
    places = {name: value.data_ptr() for name, value in model.backbone.state_dict().items()}  # type: ignore[union-attr]
    found = {name: value.data_ptr() for name, value in plain.state_dict().items()}
    assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"] and found == places
    # The training decoder stays what it is.
    assert model.backbone.config._attn_implementation == "mnemos"  # type: ignore[union-attr]
    assert plain(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 260)


def test_positions_are_those_of_training_and_pretrained_ones_stay(tmp_path: Path) -> None:
    _, model = built(dense("llama"))
    model.backbone.config.max_position_embeddings = 2048  # type: ignore[union-attr]
    lengths = {}
    for keep in (False, True):
        plain = plain_decoder(model.backbone, trained_length=96, keep_length=keep)  # type: ignore[arg-type]
        assert type(plain) is LlamaForCausalLM
        lengths[keep] = plain.config.max_position_embeddings
    assert lengths == {False: 96, True: 2048}


def test_the_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    _, model = built(dense("llama"), torch.bfloat16)
    plain = plain_decoder(model.backbone, trained_length=96, keep_length=False)  # type: ignore[arg-type]
    assert {value.dtype for value in plain.parameters()} == {torch.bfloat16} and plain.config.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
