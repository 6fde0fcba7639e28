"""Random states of a rank: what a checkpoint holds of them, and a fresh start."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from pipeline.host.hardware import on_gpu
from pipeline.parallel.weights import generator_for


def rng_state() -> dict[str, Any]:
    """Random states of this rank, in types that `torch.load(weights_only=True)` accepts."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and on_gpu():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, name: str) -> None:
    """Seeds this process's global generators by a run's seed and a name."""
    value = generator_for(seed, name).initial_seed()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
