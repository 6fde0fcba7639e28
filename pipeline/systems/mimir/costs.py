"""What the denoiser costs: model FLOPs of a residue, and what a training step holds."""

from __future__ import annotations

from pipeline.system import Flops
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.model.sequences import QUERIES, WINDOW


def denoiser_flops(config: MimirConfig, sequence_length: int) -> Flops:
    """Of one residue in training: two for every multiply-add of a matrix forward, four backward. Time, label and target
    are once a peptide, and so are the convolutions of an encoder, of a target of the most residues that it reads."""
    d = config.width
    block = 24.0 * d**2 + 4.0 * d * sequence_length
    once = 16.0 * d**2
    if config.length == "head":
        once += 2.0 * d**2 + 2.0 * d * (config.max_length - config.min_length + 1)
    if config.target == "encoder":
        c, encoder = config.encoder.width, config.encoder
        once += encoder.longest * (encoder.layers * 2.0 * WINDOW * c**2 + 4.0 * QUERIES * c) + 2.0 * QUERIES * c * d
    forward = config.layers * block + 2.0 * d * config.vocab_size + once / sequence_length
    return Flops(forward, 2 * forward)


def step_bytes(config: MimirConfig, rows: int, element: int, *, recompute: bool) -> dict[str, int]:
    """What a step of `rows` peptides keeps for the backward pass and works with beside it, at `element` bytes a number.

    A block keeps its input, both norms' outputs, q, k and v, what attention gives before and after its projection, and
    the MLP's inner values before and after the activation: 16 numbers of each channel. The loss works on float32
    tensors of the K letters. An encoder keeps four numbers of each channel of each layer of as many targets as rows.
    """
    residues, d, letters = rows * config.max_length, config.width, len(config.letters)
    block = 16 * element * d * residues
    kept = (element * d * residues * config.layers + block) if recompute else block * config.layers
    if config.target == "encoder":
        kept += 4 * element * config.encoder.width * config.encoder.longest * config.encoder.layers * rows
    # log-probabilities, weights, their mixture and its logarithm, and the gradients of two at a time.
    loss = 6 * 4 * letters * residues
    # Of the MLP's inner values the gradient before and after the activation.
    return {"kept activations": kept + loss, "working set": 8 * element * d * residues}
