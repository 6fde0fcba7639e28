"""A pretrained OLMo2 in a folder or on the hub: its sizes, checked, and its tensors."""

from __future__ import annotations

import glob
from pathlib import Path

from transformers import AutoConfig, Olmo2Config

from pipeline.errors import UserError, brief, shown
from pipeline.files.json_file import read_json
from pipeline.lm.config import BackboneConfig
from pipeline.parallel.weight_files import INDEX, SINGLE, StoredTensor, index_files, model_tensors

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
MAX_SIZE = 2**31 - 1
"""Beyond what any of them is; a damaged file may say anything."""


def backbone_config(config: BackboneConfig) -> Olmo2Config:
    """The transformers config of the backbone, without any network.

    A local folder or a cached hub name says it itself; otherwise the sizes of the section hold, and weights that differ
    from them are refused when they are read. Raises UserError.
    """
    if config.pretrained is not None:
        found = _local_config(config)
    else:
        found = None
    if found is None:
        found = Olmo2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            initializer_range=config.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    if (found.hidden_size // found.num_attention_heads) % 2:
        raise UserError(
            f"--model.backbone.width {found.hidden_size} over --model.backbone.heads {found.num_attention_heads} makes"
            " heads of an odd size, which rotary embeddings cannot turn"
        )
    if found.tie_word_embeddings:
        raise UserError("the backbone ties its embeddings: OLMo2 weights with an untied output embedding are needed")
    return found


def _local_config(config: BackboneConfig) -> Olmo2Config | None:
    assert config.pretrained is not None
    flag, folder = f"--model.backbone.pretrained {config.pretrained}", Path(config.pretrained)
    if folder.is_dir():
        read_json(folder / "config.json", "give a folder as save_pretrained writes it")
    try:
        found = AutoConfig.from_pretrained(
            config.pretrained, revision=config.revision, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a wrong value in the file raises whatever it meets
        if folder.is_dir():
            raise UserError(f"{flag}: no usable config.json there ({brief(error)}): correct it") from error
        if isinstance(error, (OSError, ValueError)):
            return None
        raise UserError(f"{flag}: its config.json cannot be used ({brief(error)}): download it again") from error
    if not isinstance(found, Olmo2Config):
        raise UserError(f"{flag}: its model type is {shown(found.model_type)}, not 'olmo2'")
    for name in SIZES:
        size = getattr(found, name)
        if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
            raise UserError(f"{flag}: {name} in its config.json is {shown(size)}: correct it")
    heads, kv_heads = found.num_attention_heads, found.num_key_value_heads or found.num_attention_heads
    if found.hidden_size % heads or heads % kv_heads:
        raise UserError(
            f"{flag}: in its config.json hidden_size {found.hidden_size}, num_attention_heads {heads} and"
            f" num_key_value_heads {kv_heads} do not divide one another: correct it"
        )
    return found


def is_local(config: BackboneConfig) -> bool:
    """Whether the pretrained weights are those of a folder, not of a hub name."""
    return config.pretrained is not None and Path(config.pretrained).is_dir()


def pretrained_tensors(config: BackboneConfig) -> dict[str, StoredTensor]:
    """The tensors of the pretrained backbone by name; its files are downloaded when it is a hub name.

    Raises UserError.
    """
    assert config.pretrained is not None
    folder = Path(config.pretrained)
    return model_tensors(folder if folder.is_dir() else _downloaded(config.pretrained, config.revision))


def _downloaded(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
        files = set(index_files(folder).values()) if (folder / INDEX).exists() else {SINGLE}
        # Of the commit that the index is of, whatever the revision names by now.
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--model.backbone.pretrained {name}: cannot be downloaded ({type(error).__name__}): give a local folder"
        ) from error
