"""Emptying memories of some rows, and the distinct rows that an empty procedural memory has."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState


def distinct_rows(name: str, shape: tuple[int, ...]) -> Tensor:
    """Unit rows of shape [..., rows, width], float32, that depend on the name alone.

    Orthonormal among each other, in groups of `width` where there are more rows than that.
    """
    *outer, rows, width = shape
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    # Not torch: under DeepSpeed's zero.Init its constructors answer in the parameters' precision.
    generator = np.random.default_rng(seed)
    groups = math.ceil(rows / width)
    square = generator.standard_normal((*outer, groups, width, width))
    orthonormal = np.linalg.qr(square)[0].reshape(*outer, groups * width, width)[..., :rows, :]
    return torch.from_numpy(np.ascontiguousarray(orthonormal, dtype=np.float32))


def reset_procedural(
    state: ProceduralState, keys: Tensor, values: Tensor, rows: Tensor, *, lifelong: bool = False
) -> ProceduralState:
    """The state with `rows` [N] bool emptied; of the others the same bits.

    lifelong: only what is eligible is emptied, not what has been committed. keys, values: of an empty memory, in a
    shape that expands to those of state.
    """
    emptied = {name: _zeroed(rows, getattr(state, name)) for name in ("eligible_keys", "eligible_values")}
    if not lifelong:
        emptied["strengths"] = _zeroed(rows, state.strengths)
        for name, initial in (("keys", keys), ("values", values)):
            old = getattr(state, name)
            emptied[name] = torch.where(_along(rows, old), initial, old)
    return dataclasses.replace(state, **emptied)


def reset_episodic(state: EpisodicState, rows: Tensor, *, lifelong: bool = False) -> EpisodicState:
    """The state with the episodes of `rows` [N] bool forgotten: strength 0. lifelong: unchanged."""
    if lifelong:
        return state
    return dataclasses.replace(state, strengths=_zeroed(rows, state.strengths))


def _zeroed(rows: Tensor, old: Tensor) -> Tensor:
    return old.masked_fill(_along(rows, old), 0)


def _along(rows: Tensor, old: Tensor) -> Tensor:
    """rows [N] in a shape that expands to that of old [N, ...]."""
    return rows.view(-1, *(1,) * (old.dim() - 1))
