"""Weights that ZeRO may have sharded, whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.parallel.weights import gathered


def full_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The named parameters, whole, on the CPU of rank 0; empty on the other ranks, which must call this too."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    wanted = set(names)
    state = {}
    for name, parameter in model.named_parameters():
        if name in wanted:
            with gathered([parameter]):
                if rank == 0:
                    state[name] = parameter.detach().cpu().clone()
    return state
