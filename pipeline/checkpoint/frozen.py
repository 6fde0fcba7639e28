"""Frozen weights are in no checkpoint: it names them by their hash, and a resume with others is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pipeline.parallel.collectives import broadcast_object
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import gathered


def frozen_weights(model: nn.Module, trained: Collection[str], topology: Topology) -> dict[str, Any] | None:
    """{"parameters", "sha256"} of every parameter that is not trained; None when all are. Collective.

    The hash is of names and float32 values in the model's order: it does not depend on ranks, ZeRO stage, or whether
    bfloat16 weights are held in float32.
    """
    digest, count = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        if name in trained:
            continue
        with torch.no_grad(), gathered([parameter]):
            count += parameter.numel()
            if topology.rank == 0:
                digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
                digest.update(parameter.detach().float().cpu().contiguous().view(-1).numpy().data)
    found = {"parameters": count, "sha256": digest.hexdigest()} if count else None
    return broadcast_object(topology, found)
