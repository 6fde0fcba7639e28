"""What every evaluation of this system asks of it, and how far its attention sees."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from transformers import Olmo2Config

from pipeline.config import RunConfig
from pipeline.data.batch import Batch, StatefulLoader
from pipeline.parallel.topology import Topology
from pipeline.system import Carry, StepContext, StepOutput
from pipeline.systems.miras.config import MirasConfig


class Evaluated(Protocol):
    """What an evaluation asks of the system."""

    config: RunConfig
    sizes: MirasConfig
    backbone: Olmo2Config

    def held_out(self, topology: Topology) -> StatefulLoader: ...

    def byte_lengths(self) -> Tensor | None: ...

    def forward(self, model: nn.Module, batch: Batch, carry: Carry, context: StepContext) -> StepOutput: ...


def reach(sizes: MirasConfig, layers: int, nearer: int = 0) -> dict[str, float]:
    """From where on attention does not see: a layer's window, and what `layers` of them reach one after the other.

    `nearer`: tokens by which what is asked for is further away than the x axis says.
    """
    attention = sizes.attention
    if attention.kind == "full":
        return {}
    edges = {
        f"window of {attention.window}": attention.window,
        f"reach of {layers} layers": layers * (attention.window - 1),
    }
    return {label: float(tokens - nearer) for label, tokens in edges.items() if tokens > nearer}
