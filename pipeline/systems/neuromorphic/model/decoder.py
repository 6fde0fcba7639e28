"""The spatial decoder: what the columns and the memories say, put together for the head, token by token."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.systems.neuromorphic.config import NeuromorphicConfig


class SpatialDecoder(nn.Module):
    """Layers of each column -> its summary; summaries and memories -> thalamic tokens; these -> the head's input."""

    def __init__(self, config: NeuromorphicConfig) -> None:
        super().__init__()

    def forward(self, layers: Tensor, procedural: Tensor, episodic: Tensor | None, working: Tensor) -> Tensor:
        """layers [L, B, N, P, H], what each layer of each column gave; procedural [N, P, H]: the values of procedural
        memory, weighted by their strengths and averaged over layers and columns; episodic [N, P, E] alike, None where
        there is no episodic memory; working [N, P, D] -> [N, P, D]."""
        ...  # written next
