"""Noise on the contexts that enter a training step."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from pipeline.systems.cvfp.documents import DocumentBatch

BLOCK = 8
"""Numbers of 32 bits that one count of the generator gives (Philox 4x64, Salmon et al., SC 2011)."""


def noise(batch: DocumentBatch, width: int, seed: int, *, way: str) -> Tensor:
    """Standard normal numbers [rows, L, width] float32 on the device of `batch`, for the contexts before its tokens.

    Those of a token are decided by seed, pass and the token's global position: not by the row it stands in, the rows
    beside it, the ranks or the device. Each position has its own counts of a generator that is a function of its count.
    Zeros where a start is no context: at each document's first token (`way` document), or at the stream's.
    """
    blocks = math.ceil((width + width % 2) / BLOCK)
    digest = hashlib.sha256(f"{seed}:context noise, pass {batch.iteration}".encode()).digest()
    key = np.frombuffer(digest[:16], np.uint64)
    length, firsts = batch.ids.shape[1], batch.first.tolist()
    drawn = np.empty((len(firsts), length, BLOCK * blocks), np.uint32)
    for row, first in zip(drawn, firsts, strict=True):
        # The generator counts before it draws, and wraps around.
        generator = np.random.Philox(counter=(first * blocks - 1) % 2**256, key=key)
        row[:] = generator.random_raw(length * blocks * 4).view(np.uint32).reshape(length, -1)
    # Of 24 bits, which float32 has: never 0, whose logarithm is none.
    drawn >>= 8
    uniform = torch.from_numpy(drawn.view(np.int32)).float().add_(0.5).div_(2**24)
    first_half, second_half = uniform[..., : BLOCK * blocks // 2], uniform[..., BLOCK * blocks // 2 :]
    # Box and Muller (Annals of Mathematical Statistics 29, 1958).
    radius, angle = (-2 * first_half.log()).sqrt(), 2 * math.pi * second_half
    found = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :width]
    begins = torch.ones(len(firsts), dtype=torch.bool) if way == "document" else batch.first.cpu() == 0
    found[begins, 0] = 0
    return found.to(batch.ids.device)
