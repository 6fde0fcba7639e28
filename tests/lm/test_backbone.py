"""Every family of decoders gives through our attention what it gives in transformers, forward and backward."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.lm.backbone import UNROTATED, build_backbone
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.lm.decoder_config import MODEL_TYPES
from pipeline.lm.pretrained import backbone_config
from tests.lm.families import FAMILIES, decoder, our_logits, plain_logits

LENGTHS = [20, 1, 27]
LENGTH = sum(LENGTHS)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def test_every_model_type_that_fits_is_among_the_families() -> None:
    assert {family["model_type"] for family in FAMILIES.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(ids: Tensor, name: str, kind: str) -> None:
    plain = decoder(name)
    backbone = build_backbone(copy.deepcopy(plain.config))
    backbone.load_state_dict(plain.state_dict())
    attention = AttentionConfig(kind=kind, window=LENGTH, sinks=0)  # type: ignore[arg-type]
    found, expected = our_logits(backbone, ids, LENGTHS, attention), plain_logits(plain, ids, LENGTHS)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    for logits in (found, expected):
        F.cross_entropy(logits[0], ids[0].roll(-1)).backward()
    gradients = {key: parameter.grad for key, parameter in backbone.named_parameters()}
    assert gradients.keys() == {key for key, _ in plain.named_parameters()}
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_layer_that_rotates_by_nothing_hands_on_its_queries_and_keys(model_type: str) -> None:
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    found = module.apply_rotary_pos_emb(q, k, *UNROTATED)
    assert found[0] is q and found[1] is k


@pytest.mark.parametrize("function", [torch.sub, torch.div, torch.maximum])
def test_what_is_no_product_of_a_rotation_is_an_error(function: Callable[..., object]) -> None:
    for factor in UNROTATED:
        with pytest.raises(TypeError):
            function(torch.ones(2), factor)


def test_a_window_of_ours_is_the_sliding_window_of_transformers(ids: Tensor) -> None:
    plain = decoder("mistral")
    whole = plain_logits(plain, ids, LENGTHS)
    plain.config.sliding_window = 7
    backbone = build_backbone(copy.deepcopy(plain.config))
    backbone.load_state_dict(plain.state_dict())
    found = our_logits(backbone, ids, LENGTHS, AttentionConfig(kind="window", window=7, sinks=0))
    expected = plain_logits(plain, ids, LENGTHS)
    assert (expected - whole).abs().max() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_clip_of_queries_keys_and_values_is_met(ids: Tensor) -> None:
    """So that the comparison above is one of clipped values."""
    plain = decoder("olmo")
    clipped = plain_logits(plain, ids, LENGTHS)
    plain.config.clip_qkv = None
    assert (clipped - plain_logits(plain, ids, LENGTHS)).abs().max() > 0.01


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tied_embeddings_are_one_parameter_that_the_state_holds_once(model_type: str) -> None:
    sizes = BackboneConfig(model_type=model_type, layers=2, width=32, heads=4, kv_heads=2, ffn=48, vocabulary=64)  # type: ignore[arg-type]
    whole, tied = (
        build_backbone(backbone_config(section)) for section in (sizes, dataclasses.replace(sizes, tied=True))
    )
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (whole, tied)]
    assert counts[0] - counts[1] == 64 * 32
    assert "lm_head.weight" in whole.state_dict() and "lm_head.weight" not in tied.state_dict()
    assert not {name for name, _ in tied.named_parameters()} ^ set(tied.state_dict())


def test_a_model_on_the_meta_device_has_no_storage() -> None:
    with torch.device("meta"):
        backbone = build_backbone(backbone_config(BackboneConfig(tied=True)))
    assert all(parameter.is_meta for parameter in backbone.parameters())
