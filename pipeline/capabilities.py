"""What only some systems can do, each a protocol: a command or a cadence asks `isinstance(system, Samples)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn

from pipeline.system import Evaluation, Phase, StepContext

if TYPE_CHECKING:
    from pipeline.runtime.sync import SyncPoint


@runtime_checkable
class Samples(Protocol):
    """Draws from the model during training."""

    def samples(self, model: nn.Module, phase: Phase, context: StepContext, sync_point: SyncPoint) -> Sequence[str]:
        """Texts, the same on every rank: a function of the weights and of the seed, phase and step of `context`.

        Collective; calls `sync_point` at the same places on every rank. What training carries on stays as it is.
        """
        ...


@runtime_checkable
class Ablates(Protocol):
    """Evaluates the model with parts of it left out."""

    def ablations(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Mapping[str, Evaluation]:
        """As `System.evaluate`, once for every part that can be left out, by what is left out ("memory off")."""
        ...
