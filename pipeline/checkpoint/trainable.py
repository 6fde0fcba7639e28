"""trainable.safetensors: what a run trains, whole and by name, to evaluate or to begin another run from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from pipeline.checkpoint.state import persistent_buffers
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import gathered, is_sharded


def trainable_content(model: nn.Module, names: Iterable[str], topology: Topology) -> tuple[dict[str, Tensor], bool]:
    """The named parameters, whole, as the model computes with them, and its persistent buffers; and whether all of it
    is in copies. On rank 0; the others get nothing. Collective.

    Parameters of ZeRO-3 are gathered one at a time and copied to host memory; those of other stages are the model's
    own, which the next update changes. Buffers are always copies: the next forward pass may change them.
    """
    parameters, main = dict(model.named_parameters()), topology.rank == 0
    found, copied = {}, True
    for name in names:
        parameter = parameters[name]
        if not is_sharded(parameter):
            copied = False
            found[name] = parameter.detach().contiguous()
            continue
        # ZeRO-3 keeps small parameters whole, and a `gathered` would part with them at its end.
        apart = parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
        with torch.no_grad(), gathered([parameter] if apart else []):
            if main:
                found[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if not main:
        return {}, True
    for name, buffer in persistent_buffers(model).items():
        found[name] = buffer.detach().to("cpu", copy=True).contiguous()
    return found, copied
