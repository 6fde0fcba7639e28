"""A trained model that is more than a decoder of transformers, as the system that trained it has it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.capabilities import Generates
from pipeline.errors import UserError
from pipeline.lm.decoding import Decoder
from pipeline.system import System


class Output(NamedTuple):
    """logits [batch, sequence, vocabulary], float32 (float64 of a model in float64)."""

    logits: Tensor


class SystemModel(nn.Module):
    """`model(ids).logits`, as a causal language model of transformers has it; each row is one text from its start."""

    def __init__(self, system: System, model: nn.Module) -> None:
        super().__init__()
        assert isinstance(system, Generates)
        self.system, self.model = system, model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def decoder(self) -> Decoder:
        """What reads text with it token by token."""
        assert isinstance(self.system, Generates)
        return self.system.decoder(self.model)

    def forward(self, input_ids: Tensor) -> Output:
        """Of ids [batch, sequence] int64; without gradients."""
        decoder = self.decoder()
        return Output(decoder.logits(input_ids, decoder.empty(len(input_ids))))


def system_model(system: System, checkpoint: Path, dtype: torch.dtype) -> SystemModel:
    """The model of a checkpoint, with what it trained and the frozen weights that it names, in `dtype`, on the CPU.

    Raises UserError for a checkpoint that lacks part of what its run trained, and where the frozen weights are not
    those that it was trained on.
    """
    from pipeline.checkpoint.frozen import frozen_weights
    from pipeline.checkpoint.manifest import read_manifest
    from pipeline.checkpoint.trainable import TRAINABLE, load_trainable
    from pipeline.parallel.topology import Topology
    from pipeline.parallel.weight_files import file_tensors

    alone = Topology()
    model = _built(system)
    system.initialise(model, alone)
    trained = {name for phase in system.phases(model) for group in phase.groups for name in group.parameters}
    missing = sorted(trained - file_tensors(checkpoint / TRAINABLE).keys())
    if missing:
        raise UserError(
            f"{checkpoint / TRAINABLE} lacks {len(missing)} of the weights that were trained, such as {missing[0]}:"
            " give another checkpoint"
        )
    load_trainable(model, checkpoint, alone)
    manifest = read_manifest(checkpoint) or {}
    if "frozen" in manifest and manifest["frozen"] != frozen_weights(model, trained, alone):
        raise UserError(
            f"{checkpoint} was trained on other frozen weights than there are now: restore the pretrained weights that"
            " its config.yaml names"
        )
    return SystemModel(system, model.to(dtype))


def _built(system: System) -> nn.Module:
    """In the precision of the run, which frozen weights were rounded to."""
    from pipeline.precision import precision_of

    previous = torch.get_default_dtype()
    torch.set_default_dtype(precision_of(system.config))
    try:
        return system.build()
    finally:
        torch.set_default_dtype(previous)
