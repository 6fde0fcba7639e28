"""How far a step of each rule may go. `pipeline.ops.gates` has the region of the exact rules.

The chunk-start rules take all gradients of a chunk at its start, so what must stay below about 1 is the sum of a
chunk's step sizes, not one of them: their range is divided by the chunk. Without momentum and with a convex error map
of slope at most 1 (yaad), M -> M - sum_j theta_j k_j^T psi(k_j M - v_j) then stretches no distance, whatever the unit
keys: it is a step of at most 0.9 on a convex function whose gradient has slope 1. moneta and mlp have no such bound:
their gradients are clipped, so that they grow linearly at worst. memora's memory is bounded by its link, swiglu's by
its norms; swiglu's range keeps the update of a chunk of unrelated tokens, which grows with the root of their number,
as large as the weights.
"""

from __future__ import annotations

import math

from pipeline.ops.gates import STEP_MARGIN
from pipeline.systems.miras.config import MemoryConfig


def largest_step(config: MemoryConfig) -> float:
    """The largest step size of the rule without momentum."""
    chunk = config.chunk_start
    if chunk is None:
        return STEP_MARGIN
    return STEP_MARGIN / (math.sqrt(chunk) if config.rule == "swiglu" else chunk)
