"""A folder as OLMo's trainer writes it, `step1000-unsharded`: model.pt, optim.pt, train.pt and config.yaml.

Source: github.com/allenai/OLMo, olmo/checkpoint.py (FullCheckpointer), olmo/train.py (trainer_state_dict) and
olmo/optim.py (get_param_groups).
"""

from __future__ import annotations

import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import UserError, brief, shown
from pipeline.files.pickle_file import read_pickle
from pipeline.lm.olmo_config import decoder_of
from pipeline.lm.olmo_layout import split

MODEL, OPTIMIZER, TRAINER, CONFIG = "model.pt", "optim.pt", "train.pt", "config.yaml"
FIX = "take one that OLMo or this program wrote"


def is_native(folder: Path) -> bool:
    """Whether a folder is such a one; its files may still be damaged."""
    return (folder / MODEL).is_file() and (folder / CONFIG).is_file()


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


def read_decoder(folder: Path) -> PreTrainedConfig:
    """The transformers config of the decoder in a native folder. Raises UserError."""
    return decoder_of(read_config(folder).get("model"), str(folder / CONFIG))


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
    """What train.pt of a native folder says; {} where there is none. Raises UserError.

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
