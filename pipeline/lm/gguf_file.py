"""A backbone in a GGUF file, read by transformers, which dequantises it: its config, and its tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from pipeline.errors import UserError, brief
from pipeline.parallel.weight_files import StoredTensor

PACKAGES = ("gguf", "accelerate")
WHOLE = "give the model's safetensors folder"
SCALED = "rope_freqs.weight"
"""The tensor of frequency factors (Llama 3.1), which transformers leaves out."""


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def gguf_config(name: str, flag: str) -> Any:
    """The transformers config of the file. Raises UserError, which begins with `flag`."""
    path = _checked(name, flag)
    try:
        _check_contents(path, flag)
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises whatever it meets
        raise _unreadable(flag, error) from error


def gguf_tensors(name: str, flag: str) -> dict[str, StoredTensor]:
    """Its tensors by their names in transformers, dequantised to float32, in host memory. Raises UserError."""
    path = _checked(name, flag)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        model, loading = loaded
        stored = len(_reader(path).tensors)
    except Exception as error:
        raise _unreadable(flag, error) from error
    # transformers fills what a file lacks with random weights, and leaves out what it has no place for.
    lacks = sorted(loading["missing_keys"])
    if lacks:
        raise UserError(f"{flag}: has no {lacks[0]} ({len(lacks)} tensors are missing): {WHOLE}")
    wanted = len(list(model.parameters()))
    if stored != wanted:
        raise UserError(f"{flag}: has {stored} tensors, and transformers reads {wanted} of them: {WHOLE}")
    return {
        name: StoredTensor(path, tuple(parameter.shape), "F32", parameter.detach())
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _checked(name: str, flag: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{flag}: no such file: give a GGUF file, or a folder as save_pretrained writes it")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{flag}: a GGUF file needs the package {missing[0]}: pip install -e '.[gguf]'")
    return path


def _unreadable(flag: str, error: Exception) -> UserError:
    return UserError(f"{flag}: cannot be read as GGUF ({brief(error)}): download it again, or {WHOLE}")


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def _check_contents(path: Path, flag: str) -> None:
    """Refuses a file that transformers would read in part or not at all."""
    reader = _reader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    architecture = values.get("general.architecture")
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise UserError(f"{flag}: transformers reads no GGUF file of the architecture {architecture!r}: {WHOLE}")
    if values.get("split.count", 1) > 1:
        raise UserError(
            f"{flag}: one of {values['split.count']} parts of a model: join them (llama-gguf-split --merge), or {WHOLE}"
        )
    kinds = [value for key, value in values.items() if key.endswith(".rope.scaling.type")]
    if any(tensor.name == SCALED for tensor in reader.tensors) or any(kind != "none" for kind in kinds):
        raise UserError(
            f"{flag}: its rotary frequencies are scaled, which transformers does not read from a GGUF file: {WHOLE}"
        )
