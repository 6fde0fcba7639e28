"""What the model costs: FLOPs of a token, and what a step holds beside the weights."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.system import Flops
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.phase import PREDICTION

KEPT_NUMBERS, KEPT_BYTES = 2, 2
"""What a block keeps of each channel for its gradient: the sum of each stream before the norms, and a byte of each
rectified number."""


def block_flops(sizes: CvfpConfig) -> float:
    """Of one token through all blocks, forward: two for every multiply-add of a [2D, 2D] matrix."""
    return 8.0 * sizes.layers * sizes.width**2


def flops(sizes: CvfpConfig, phase: str | None) -> Flops:
    """Of one token in training: two for every multiply-add of a matrix forward, four backward.

    A pass of the first phase solves for the contexts first, once where it is sequential, which is a forward pass of
    every block; so does the second phase once an epoch where it trains them.
    """
    blocks, head = block_flops(sizes), 2.0 * sizes.width * sizes.vocab
    if phase != PREDICTION:
        return Flops(2 * blocks, 2 * blocks)
    if sizes.prediction.freeze_context:
        return Flops(head, 2 * head)
    solves = blocks / sizes.prediction.refresh
    return Flops(solves + blocks + head, 2 * (blocks + head))


def activation_bytes(
    sizes: CvfpConfig, config: RunConfig, documents: int | None, element: int, data: int
) -> dict[str, int]:
    """What a rank holds in training of its share of `documents` (None: of `num_samples`) among `data` ranks, and of a
    micro-batch, at `element` bytes a number.

    A block keeps `KEPT_NUMBERS` and `KEPT_BYTES` of each channel (model/frugal.py); behind the last one are the two
    streams that the loss reads, and float32 statistics of their norms. Contexts of the pass before are float32, one a
    token.
    """
    rows, length, width = config.batch_size, config.sequence_length, sizes.width
    tokens = rows * length
    of_all = documents if documents is not None else sizes.num_samples
    contexts = {} if of_all is None else {"contexts": 4 * width * length * -(-of_all // data)}
    kept = sizes.layers * tokens * width * (KEPT_NUMBERS * element + KEPT_BYTES) + tokens * (2 * width * element + 16)
    # A block's backward pass: gradients of both sums, and of what was added to them; of one stream at a time what
    # entered, its gradient, and that of the sum before its norm.
    return {
        **contexts,
        "kept activations": kept,
        "working set": 7 * tokens * width * element,
        # Their average, float32; their sum of the step, its gradient and a product on the way, float64.
        "second moments": (4 + 3 * 8) * width**2,
    }
