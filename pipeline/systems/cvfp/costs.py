"""What the model costs: FLOPs of a token, and what a step holds beside the weights."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.system import Flops
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.phase import PREDICTION


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

    A block keeps its inputs, the sum of each stream before its norm, and the rectified output: 6 numbers of each
    channel, and float32 statistics of two norms. Contexts of the pass before are float32, one a token.
    """
    rows, length, width = config.batch_size, config.sequence_length, sizes.width
    tokens = rows * length
    of_all = documents if documents is not None else sizes.num_samples
    contexts = {} if of_all is None else {"contexts": 4 * width * length * -(-of_all // data)}
    kept = sizes.layers * tokens * (6 * width * element + 16)
    # The loss in chunks: logits and their gradient of one chunk, float32.
    return {
        **contexts,
        "kept activations": kept,
        "working set": 4 * tokens * width * element,
        # Their average, float32; their sum of the step, its gradient and a product on the way, float64.
        "second moments": (4 + 3 * 8) * width**2,
    }
