"""What is asked of a decoder's config, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import attention_width, check_window, head_dim, kv_heads, kv_width, sliding_window

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}


def config(model_type: str, **changes: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


def test_widths_follow_the_heads() -> None:
    grouped = config("qwen3", head_dim=32, num_key_value_heads=2)
    assert (head_dim(grouped), kv_heads(grouped)) == (32, 2)
    assert (attention_width(grouped), kv_width(grouped)) == (128, 64)
    assert head_dim(config("olmo2")) == 16 and kv_heads(config("olmo2")) == 4


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 128}, None),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, 128),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4}, None),
        ("llama", {"sliding_window": 128}, None),
    ],
)
def test_a_sliding_window_is_that_of_the_layers_that_have_one(
    model_type: str, changes: dict[str, Any], window: int | None
) -> None:
    assert sliding_window(config(model_type, **changes)) == window


def test_attention_sees_no_more_than_a_sliding_window() -> None:
    mistral = config("mistral", sliding_window=256)
    for attention, length in ((AttentionConfig(window=256), 4096), (AttentionConfig(kind="full"), 256)):
        check_window(attention, mistral, length)
    check_window(AttentionConfig(kind="full"), config("llama"), 2**20)
    fix = "layers of this backbone see 256 tokens: give --model.attention.kind window --model.attention.window 256"
    with pytest.raises(UserError, match=f"^--model.attention.window 257: {fix}"):
        check_window(AttentionConfig(window=257), mistral, 4096)
    with pytest.raises(UserError, match=f"^--model.attention.kind full with --sequence-length 257: {fix}"):
        check_window(AttentionConfig(kind="full"), mistral, 257)
