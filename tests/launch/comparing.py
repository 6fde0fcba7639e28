"""Two checkpoints, value by value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

from pipeline.checkpoint.safe import load_pickle


def differences(one: Path, other: Path) -> list[str]:
    """Files, or places within them, that training decides and that differ in a bit; the first few."""
    left, right = content(one), content(other)
    return [place for place in sorted(left.keys() | right.keys()) if left.get(place) != right.get(place)][:9]


def content(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that training decides, by file and place within it."""
    found: dict[str, Any] = {}
    for path in checkpoint.iterdir():
        if path.suffix == ".pt":
            # The same values may be pickled in other words.
            found.update(leaves(load_pickle(path), path.name))
        elif path.name not in ("config.yaml", "manifest.json", "trainer_state.json"):
            found[path.name] = path.read_bytes()
    return found


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield place, (tuple(value.shape), value.dtype, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{place}/{index}")
    else:
        # DeepSpeed's scaler has a repr of JSON, which its dtype is not.
        yield place, repr(vars(value) if isinstance(value, LossScalerBase) else value)
