"""A pretrained backbone in a folder, a GGUF file or on the hub: its config, checked, and its tensors."""

from __future__ import annotations

import glob
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from pipeline.errors import UserError, brief, shown
from pipeline.files.given_path import expanded, is_gguf, is_path
from pipeline.files.json_file import read_json
from pipeline.lm.config import FETCH_SMOLLM2, SMOLLM2, BackboneConfig
from pipeline.lm.decoder_config import check_decoder, check_model_type, kv_heads
from pipeline.lm.gguf_file import gguf_config, gguf_tensors
from pipeline.parallel.weight_files import INDEX, SINGLE, StoredTensor, index_files, model_tensors

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
MAX_SIZE = 2**31 - 1
"""Beyond what any of them is; a damaged file may say anything."""


def backbone_config(config: BackboneConfig) -> PreTrainedConfig:
    """The transformers config of the backbone, without any network.

    A local folder, a GGUF file or a cached hub name says it itself; otherwise the model type and sizes of the section
    hold, and weights that differ from them are refused when they are read. Raises UserError.
    """
    found = None if config.pretrained is None else _local_config(config)
    if found is None:
        found = AutoConfig.for_model(
            config.model_type,
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            # Some families would choose their own.
            head_dim=config.width // config.heads,
            sliding_window=None,
            rms_norm_eps=config.norm_eps,
            initializer_range=config.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=config.tied,
            **({} if config.clip_qkv is None else {"clip_qkv": config.clip_qkv}),
        )
        check_decoder(found, f"--model.backbone.width {config.width} with --model.backbone.heads {config.heads}")
    return found


def _local_config(config: BackboneConfig) -> PreTrainedConfig | None:
    """The checked config of pretrained weights that are on this machine; None for a hub name that is not cached."""
    assert config.pretrained is not None
    flag, folder = f"--model.backbone.pretrained {config.pretrained}", expanded(config.pretrained)
    if is_gguf(config.pretrained):
        return _checked(gguf_config(config.pretrained, flag), flag, "the file")
    if folder.is_dir():
        read_json(folder / "config.json", "give a folder as save_pretrained writes it")
    try:
        found = AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else config.pretrained,
            revision=config.revision,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a wrong value in the file raises whatever it meets
        if folder.is_dir():
            raise UserError(f"{flag}: no usable config.json there ({brief(error)}): correct it") from error
        if isinstance(error, (OSError, ValueError)):
            return None
        raise UserError(f"{flag}: its config.json cannot be used ({brief(error)}): download it again") from error
    return _checked(found, flag, "its config.json")


def _checked(found: PreTrainedConfig, flag: str, where: str) -> PreTrainedConfig:
    """The config, whose sizes are possible and whose decoder fits. Raises UserError."""
    check_model_type(found, flag)
    for name in SIZES:
        size = getattr(found, name)
        if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
            raise UserError(f"{flag}: {name} in {where} is {shown(size)}: correct it")
    size = getattr(found, "head_dim", None)
    if size is not None and not (isinstance(size, int) and 1 <= size <= MAX_SIZE):
        raise UserError(f"{flag}: head_dim in {where} is {shown(size)}: correct it")
    heads, groups = found.num_attention_heads, kv_heads(found)
    if (size is None and found.hidden_size % heads) or heads % groups:
        raise UserError(
            f"{flag}: in {where} hidden_size {found.hidden_size}, num_attention_heads {heads} and"
            f" num_key_value_heads {groups} do not divide one another: correct it"
        )
    check_decoder(found, flag)
    return found


def trained_length(config: BackboneConfig) -> int | None:
    """Positions that pretrained weights were trained at, as their config says; None where it does not, for random
    weights, and for a hub name that is not cached."""
    found = None if config.pretrained is None else _local_config(config)
    return getattr(found, "max_position_embeddings", None)


def check_fetched(config: BackboneConfig) -> None:
    """Raises UserError where the model is one that a command fetches, which has not been run here."""
    if config.pretrained == SMOLLM2 and not Path(SMOLLM2).is_dir():
        raise UserError(f"--model.backbone.pretrained {SMOLLM2}: not there yet: {FETCH_SMOLLM2}")


def check_path(config: BackboneConfig) -> None:
    """Raises UserError where the model is a path that leads nowhere."""
    name = config.pretrained
    if name is not None and is_path(name) and not expanded(name).exists():
        raise UserError(f"--model.backbone.pretrained {name}: no such folder or file: correct the path")


def is_local(config: BackboneConfig) -> bool:
    """Whether the pretrained weights are those of a folder, not of a hub name."""
    return config.pretrained is not None and expanded(config.pretrained).is_dir()


def pretrained_tensors(config: BackboneConfig, built: PreTrainedConfig | None = None) -> dict[str, StoredTensor]:
    """The tensors of the pretrained backbone by name; its files are downloaded when it is a hub name, and read whole
    when they are one of GGUF. `built`: the config of the decoder that they are for. Raises UserError.
    """
    assert config.pretrained is not None
    if is_gguf(config.pretrained):
        return gguf_tensors(config.pretrained, f"--model.backbone.pretrained {config.pretrained}")
    check_fetched(config)
    check_path(config)
    folder = expanded(config.pretrained)
    if folder.is_dir():
        return model_tensors(folder)
    downloaded = _downloaded(config.pretrained, config.revision)
    if built is not None:
        _check_as_built(config, built)
    return model_tensors(downloaded)


def _check_as_built(config: BackboneConfig, built: PreTrainedConfig) -> None:
    """Raises UserError when a hub name that was not cached turns out to be another model than the section says."""
    found = _local_config(config)
    for name in ("model_type", "tie_word_embeddings", *SIZES):
        if found is not None and getattr(found, name) != getattr(built, name):
            raise UserError(
                f"--model.backbone.pretrained {config.pretrained}: its config.json, not in the cache until now, has"
                f" {name} {shown(getattr(found, name))}, and the model was built with {shown(getattr(built, name))}:"
                " start again, now it is read first"
            )


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
