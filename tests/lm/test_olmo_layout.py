"""OLMo's native layout: it computes what transformers computes, and goes there and back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig

from pipeline.errors import UserError
from pipeline.lm.olmo_config import check_layout, decoder_of, model_section
from pipeline.lm.olmo_folder import read_config, read_trainer, read_weights, tokenizer_name
from pipeline.lm.olmo_layout import fused, has_layout, split
from pipeline.lm.olmo_optimizer import MOMENTS, AdamSettings, AdamState, optimizer_content, read_optimizer
from tests.lm.olmo_reference import native_logits, small_config, small_decoder

KINDS = [
    ("first", True, 4), ("first", False, 4), ("first", True, 2), ("second", True, 4), ("second", False, 1),
]  # fmt: skip

SETTINGS = AdamSettings(1e-4, 4e-4, (0.9, 0.95), 1e-5, None)

GROUP = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-5}


def weights_of(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    state = small_decoder(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize(("kind", "tied", "kv_heads"), KINDS)
def test_the_native_tensors_have_the_logits_of_transformers(kind: str, tied: bool, kv_heads: int) -> None:
    config = small_config(kind, tied=tied, kv_heads=kv_heads)
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    section = model_section(config, vocabulary=90, eos=5, length=24)
    found = native_logits(fused(weights_of(config), config), section, ids)
    with torch.no_grad():
        wanted = small_decoder(config).double()(ids).logits
    # The rotary embedding of transformers is float32.
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "tied", "kv_heads"), KINDS)
def test_weights_and_config_come_back_bit_for_bit(kind: str, tied: bool, kv_heads: int) -> None:
    config = small_config(kind, tied=tied, kv_heads=kv_heads)
    weights = weights_of(config)
    section = yaml.safe_load(yaml.safe_dump(model_section(config, vocabulary=90, eos=5, length=64)))
    found = decoder_of(section, "here")
    assert split(fused(weights, config), found, "here").keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in split(fused(weights, config), found, "x").items())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "tie_word_embeddings",
            "rope_parameters", "max_position_embeddings", "model_type")  # fmt: skip
    assert {name: getattr(found, name) for name in same} == {name: getattr(config, name) for name in same}
    assert getattr(found, "clip_qkv", None) == getattr(config, "clip_qkv", None)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["first", "second"]), tied=st.booleans(), layers=st.integers(1, 3), heads=st.integers(1, 4),
    groups=st.integers(1, 4), size=st.sampled_from([2, 4]), ffn=st.integers(1, 9), vocabulary=st.integers(1, 9),
)  # fmt: skip
def test_any_sizes_go_there_and_back(
    kind: str, tied: bool, layers: int, heads: int, groups: int, size: int, ffn: int, vocabulary: int
) -> None:
    config = small_config(
        kind, tied=tied, kv_heads=groups, num_hidden_layers=layers, num_attention_heads=heads * groups,
        hidden_size=heads * groups * size, intermediate_size=ffn, vocab_size=vocabulary,
    )  # fmt: skip
    weights = weights_of(config)
    native = fused(weights, config)
    found = split(native, config, "here")
    assert found.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    assert sum(value.numel() for value in native.values()) == sum(value.numel() for value in weights.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_type": "llama"}, "block_type is 'llama'"),
        ({"alibi": True}, "alibi is True"),
        ({"rope": False}, "rope is False"),
        ({"activation_type": "gelu"}, "activation_type is 'gelu'"),
        ({"include_bias": True}, "include_bias is True"),
        ({"bias_for_layer_norm": None, "include_bias": True}, "include_bias is True"),
        ({"layer_norm_with_affine": True}, "layer_norm_with_affine is True"),
        ({"layer_norm_type": "rms"}, "is False"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"attention_layer_norm": True}, "attention_layer_norm is True"),
        ({"n_layers": 0}, "n_layers is 0: give a whole number"),
        ({"d_model": "1e3"}, "d_model is '1e3': give a whole number"),
        ({"n_heads": 5}, "d_model 32 is not divisible by n_heads 5"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], words: str) -> None:
    section = model_section(small_config("first", tied=True), vocabulary=90, eos=5, length=64)
    decoder_of(section, "here")
    with pytest.raises(UserError, match=r"^here: ") as error:
        decoder_of({**section, **change}, "here")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_sizes_that_olmo_does_not_have_are_refused() -> None:
    check_layout(small_config("first", tied=True), "here")
    scaled = small_config("second", tied=True)
    scaled.rope_parameters = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(UserError, match=r"here: its rotary embedding \(linear\)"):
        check_layout(scaled, "here")


def test_only_the_olmos_have_the_layout() -> None:
    assert has_layout(small_config("first", tied=True)) and has_layout(small_config("second", tied=False))
    assert not has_layout(AutoConfig.for_model("llama"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("blocks.1.ff_proj", None, "lacks 'transformer.blocks.1.ff_proj.weight'"),
        ("blocks.2.ff_out", torch.zeros(1), "is no tensor of"),
        ("blocks.0.att_proj", torch.zeros(3, 32), "is (3, 32), and (96, 32)"),
        ("wte", torch.zeros(96, 32, dtype=torch.int64), "torch.int64"),
    ],
)
def test_weights_of_another_model_are_refused(
    name: str, value: torch.Tensor | None, words: str, tmp_path: Path
) -> None:
    config = small_config("first", tied=True)
    native: dict[str, Any] = fused(weights_of(config), config)
    native[f"transformer.{name}.weight"] = value
    native = {key: tensor for key, tensor in native.items() if tensor is not None}
    torch.save(native, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt") as error:
        read_weights(tmp_path, config)
    assert words in str(error.value)


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("kind", ["first", "second"])
def test_the_optimizer_state_comes_back_bit_for_bit(kind: str, names: bool, tmp_path: Path) -> None:
    config = small_config(kind, tied=False)
    weights = weights_of(config)
    generator = torch.Generator().manual_seed(2)
    moments = {
        moment: {name: torch.rand(value.shape, generator=generator) for name, value in weights.items()}
        for moment in MOMENTS
    }
    decay = {name: 0.1 if "proj" in name else 0.0 for name in weights}
    steps = {name: 7.0 if "embed" not in name else 0.0 for name in weights}
    content = optimizer_content(AdamState(moments, steps, decay, SETTINGS), config, "here")
    if names:  # as FSDP writes it
        groups = content["param_groups"]
        named = {key: name for group in groups for key, name in zip(group["params"], group["param_names"], strict=True)}
        wrapped = {key: name.replace("blocks.", "blocks._fsdp_wrapped_module.") for key, name in named.items()}
        content["state"] = {wrapped[key]: value for key, value in content["state"].items()}
        for group in groups:
            group["params"] = group["param_names"] = [wrapped[key] for key in group["params"]]
    torch.save(content, tmp_path / "optim.pt")
    found = read_optimizer(tmp_path, config)
    assert found is not None and found.steps == steps and found.decay == decay and found.settings == SETTINGS
    for moment in MOMENTS:
        updated = {name for name in weights if steps[name]}
        assert found.moments[moment].keys() == updated
        assert all(torch.equal(value, moments[moment][name]) for name, value in found.moments[moment].items())


def test_torch_takes_the_optimizer_state(tmp_path: Path) -> None:
    config = small_config("first", tied=True)
    native = fused(weights_of(config), config)
    state = AdamState({moment: weights_of(config) for moment in MOMENTS}, dict.fromkeys(weights_of(config), 3.0),
                      {name: 0.1 if "proj" in name else 0.0 for name in weights_of(config)},
                      SETTINGS)  # fmt: skip
    content = optimizer_content(state, config, "here")
    groups = [[torch.nn.Parameter(native[name]) for name in group["param_names"]] for group in content["param_groups"]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(content)
    for parameters in groups:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.state[groups[0][0]]["step"] == 4


def test_parts_with_different_decay_are_refused() -> None:
    config = small_config("first", tied=True)
    weights = weights_of(config)
    decay = {name: 0.1 if "q_proj" in name else 0.0 for name in weights}
    state = AdamState(dict.fromkeys(MOMENTS, weights), dict.fromkeys(weights, 1.0), decay, SETTINGS)
    with pytest.raises(UserError, match=r"here: the parts of .*att_proj.* differ"):
        optimizer_content(state, config, "here")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state": {0: {"step": 1}}, "param_groups": [{"params": [0]}]}, "no optimizer's state with the names"),
        ({"state": {0: {}}, "param_groups": [{**GROUP, "params": [0], "param_names": ["other"]}]},
         "'other' is no parameter"),
        ({"state": {"transformer.wte.weight": {"step": 1, "exp_avg": torch.zeros(1)}},
          "param_groups": [{**GROUP, "params": ["transformer.wte.weight"]}]}, "has no 'exp_avg_sq'"),
        ([1], "no optimizer's state"),
        (Evil(), "nothing of it was run"),
    ],
)  # fmt: skip
def test_another_optimizer_state_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "optim.pt")
    with pytest.raises(UserError, match=r"optim\.pt") as error:
        read_optimizer(tmp_path, small_config("first", tied=True))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_state_of_olmos_trainer_is_read_and_runs_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import random

    import numpy as np

    state = {"global_step": 3, "epoch": 0, "unsharded_checkpoints": [tmp_path / "step0-unsharded"],
             "rng": {"python": random.getstate(), "numpy": np.random.get_state()}}  # fmt: skip
    torch.save(state, tmp_path / "train.pt")
    found = read_trainer(tmp_path)
    assert found["unsharded_checkpoints"] == state["unsharded_checkpoints"] and found["global_step"] == 3
    assert (found["rng"]["numpy"][1] == state["rng"]["numpy"][1]).all()
    torch.save({"epoch": Evil()}, tmp_path / "train.pt")
    with pytest.raises(UserError, match="nothing of it was run"):
        read_trainer(tmp_path)
    torch.save([1], tmp_path / "train.pt")
    with pytest.raises(UserError, match="holds no state of a trainer"):
        read_trainer(tmp_path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not YAML"),
        ("- 1", "holds no sections"),
        (None, "cannot be read"),
    ],
)
def test_a_config_that_is_none_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml") as error:
        read_config(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_of_here_or_of_the_hub_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.model").write_bytes(b"")
    named = [str(tmp_path), str(tmp_path / "own.model"), "bytes", "allenai/gpt-neox-olmo-dolma-v1_5"]
    others = ["tokenizers/allenai_dolma2.json", "/nowhere/own.model", "gpt2/a/b", None, 3]
    for name in named + others:
        assert tokenizer_name({"tokenizer": {"identifier": name}}) == (name if name in named else None)
    assert tokenizer_name({}) is None
