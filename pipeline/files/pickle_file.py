"""Reading what torch.save wrote without running the code in a pickle: tensors, plain values and named types alone."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError

DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
)
"""What torch.load raises at files that it did not write, or not to their end."""


def read_pickle(path: Path, trusted: Sequence[Any] = (), *, fix: str, mmap: bool = False) -> Any:
    """What torch.save wrote to `path`, on the CPU; with `mmap` tensors are read when they are used.

    `trusted`: types besides torch's own that it may hold, whose construction runs no code of the file's choice; or
    pairs of a type and the name by which the file knows it. Raises UserError when it is damaged, and, ending with
    `fix`, when it holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(trusted)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except DAMAGE as error:
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found is not None:
            raise UserError(
                f"{path}: holds something else than tensors and plain values ({found[1]}): nothing of it was run; {fix}"
            ) from error
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{path}: cannot be read ({reason}): copy it again, or take another checkpoint") from error
