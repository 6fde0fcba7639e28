"""A backbone in a GGUF file, read by transformers, which dequantises it: its config, and its tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UserError, brief, shown
from pipeline.files.given_path import expanded
from pipeline.parallel.weight_files import StoredTensor

PACKAGES = ("gguf", "accelerate")
WHOLE = "give the model's safetensors folder"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures of GGUF that transformers reads and whose decoders are backbones here (`pipeline.lm.config`)."""
SCALED = "rope_freqs.weight"
"""The tensor of frequency factors (Llama 3.1), which transformers leaves out."""


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


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes the file's model into a folder as `save_pretrained` does: config, float32 safetensors (exactly what the
    file says), tokenizer. Raises UserError."""
    flag = path.name
    # transformers does not save a model that it read from a GGUF file: this one is made from its config.
    model = AutoModelForCausalLM.from_config(gguf_config(str(path), flag), dtype=torch.float32)
    tensors = gguf_tensors(str(path), flag)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name].read(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever it meets
        raise UserError(f"{flag}: cannot be read as GGUF ({brief(error)}): download it again") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checked(flag: str) -> None:
    """Raises UserError, which begins with `flag`, when a package is missing that reading a GGUF file needs."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{flag}a GGUF file needs the package {missing[0]}: pip install -e '.[gguf]'")


def _checked(name: str, flag: str) -> Path:
    path = expanded(name)
    if not path.is_file():
        raise UserError(f"{flag}: no such file: give a GGUF file, or a folder as save_pretrained writes it")
    checked(f"{flag}: ")
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
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{flag}: its architecture is {shown(architecture)}, which is not read from a GGUF file: use one of"
            f" {', '.join(ARCHITECTURES)}, or {WHOLE}"
        )
    if values.get("split.count", 1) > 1:
        raise UserError(
            f"{flag}: one of {values['split.count']} parts of a model: join them (llama-gguf-split --merge), or {WHOLE}"
        )
    kinds = [value for key, value in values.items() if key.endswith(".rope.scaling.type")]
    if any(tensor.name == SCALED for tensor in reader.tensors) or any(kind != "none" for kind in kinds):
        raise UserError(
            f"{flag}: its rotary frequencies are scaled, which transformers does not read from a GGUF file: {WHOLE}"
        )
