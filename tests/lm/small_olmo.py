"""A small OLMo2 as transformers saves it, in several shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Olmo2Config, Olmo2ForCausalLM

from pipeline.parallel.weight_files import INDEX

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def save_olmo(folder: Path) -> Path:
    """Saves the model in a folder, and returns it."""
    config = Olmo2Config(**SIZES, pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    Olmo2ForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file() and len(list(folder.glob("*.safetensors"))) > 2
    return folder
