"""Reading what torch.save wrote without running the code in a pickle: tensors, plain values and a few named types."""

from __future__ import annotations

import contextlib
import enum
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from pipeline.files.pickle_file import read_pickle

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FIX = "take a checkpoint of this program"


def trusted_types() -> list[Any]:
    """The types besides torch's own that DeepSpeed's shards hold; building one runs no code of the file's choice."""
    return [LossScaler, DynamicLossScaler, fragment_address]


def plain(value: Any) -> Any:
    """Nested dicts, lists and tuples with the values of enumerations in their place.

    Python 3.11.0 to 3.11.3 pickle an enumeration as a call of getattr, which no allow-list should hold.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        items = ((key, plain(item)) for key, item in value.items())
        return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def load_pickle(path: Path, *, mmap: bool = False) -> Any:
    """What torch.save wrote to `path`, on the CPU; with `mmap` tensors are read when they are used.

    Raises UserError when it is damaged or holds anything but tensors, plain values and `trusted_types`.
    """
    return read_pickle(path, trusted_types(), fix=FIX, mmap=mmap)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within it every torch.load, however it is called, refuses what `load_pickle` refuses."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(trusted_types()):
            yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
