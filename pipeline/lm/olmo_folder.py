"""A folder as OLMo's trainer writes it, `step1000-unsharded`: model.pt, optim.pt, train.pt and config.yaml.

Source: github.com/allenai/OLMo, olmo/checkpoint.py (FullCheckpointer), olmo/train.py (trainer_state_dict) and
olmo/optim.py (get_param_groups).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import UserError, brief, shown
from pipeline.files.given_path import expanded
from pipeline.files.pickle_file import read_pickle
from pipeline.lm.olmo_layout import split

MODEL, OPTIMIZER, TRAINER, CONFIG = "model.pt", "optim.pt", "train.pt", "config.yaml"
NATIVE = "olmo"
"""What the layout is called in flags."""
FIX = "take one that OLMo or this program wrote"


def is_native(folder: Path) -> bool:
    """Whether a folder is such a one; its files may still be damaged."""
    return (folder / MODEL).is_file() and (folder / CONFIG).is_file()


def check_native(folder: Path) -> None:
    """Raises UserError for a folder that is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give one as OLMo writes it, step1000-unsharded")
    missing = next((name for name in (MODEL, CONFIG) if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(f"{folder}: holds no {missing}: give a folder as OLMo writes it, step1000-unsharded")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.yaml of a native folder. Raises UserError."""
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {FIX}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({brief(error)}): copy it again, or {FIX}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no sections: {FIX}")
    return content


def tokenizer_name(content: Mapping[str, Any]) -> str | None:
    """The tokenizer that a config.yaml names, as `--data.tokenizer` takes it; None where it names a file of OLMo's
    repository, or none."""
    section = content.get("tokenizer")
    name = section.get("identifier") if isinstance(section, dict) else None
    if not isinstance(name, str):
        return None
    # NAME or ORGANISATION/NAME, with a revision or without.
    on_hub = re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?", name) is not None
    on_hub = on_hub and not name.endswith((".json", ".model"))
    place = expanded(name)
    here = name == "bytes" or place.is_dir() or (name.endswith(".model") and place.is_file())
    return name if here or on_hub else None


def read_weights(folder: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The weights in a native folder by transformers' names. Raises UserError unless they are those of the decoder."""
    path = folder / MODEL
    content = read_pickle(path, fix=FIX, mmap=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no tensors by name: {FIX}")
    odd = next((name for name, value in content.items() if not value.is_floating_point()), None)
    if odd is not None:
        raise UserError(f"{path}: {shown(odd)} is {content[odd].dtype}, no floating-point weights: {FIX}")
    return split(content, config, str(path))


def read_trainer(folder: Path) -> dict[str, Any]:
    """The content of train.pt in a native folder; {} where there is none. Raises UserError.

    OLMo keeps arrays of NumPy in it (a generator's state) and paths (of checkpoints).
    """
    path = folder / TRAINER
    if not path.is_file():
        return {}
    content = read_pickle(path, _TRAINER_TYPES, fix=FIX)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state of a trainer: {FIX}")
    return content


_ARRAY: Any = np.zeros(0).__reduce__()[0]
_TRAINER_TYPES = [
    # By the names of NumPy 1 and 2, and of Python up to 3.12 and from 3.13 on.
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((pathlib.PosixPath, f"pathlib{module}.PosixPath") for module in ("", "._local")),
    np.ndarray,
    np.dtype,
    type(np.dtype("uint32")),
]
