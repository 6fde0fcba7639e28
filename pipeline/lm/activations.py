"""What a training step of a decoder holds on a GPU, by formula: an estimate, in bytes of one rank.

Derived op by op from what the model's eager ops keep and make. `tests/systems/miras/test_activations.py` holds it
against steps that are traced with tensors which have sizes and no storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedConfig

from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import attention_width, head_dim, kv_width, norm_width
from pipeline.ops.cross_entropy import LOGIT_BYTES


class DecoderStep(Protocol):
    """One micro-batch of a run, as a rank sees it."""

    @property
    def backbone(self) -> PreTrainedConfig: ...

    @property
    def attention(self) -> AttentionConfig: ...

    @property
    def trainable(self) -> bool:
        """Whether the decoder itself is trained."""
        ...

    @property
    def element(self) -> int:
        """Bytes of a number that the model computes in."""
        ...

    @property
    def rows(self) -> int: ...

    @property
    def sequence(self) -> int: ...

    @property
    def degree(self) -> int:
        """Ranks that share a sequence."""
        ...

    @property
    def recompute(self) -> bool: ...

    @property
    def tokens(self) -> int:
        """This rank's part of the micro-batch's tokens."""
        ...

    @property
    def head_dim(self) -> int:
        """Of attention."""
        ...

    @property
    def kv_width(self) -> int: ...


@dataclass(frozen=True)
class TrainedDecoder:
    """A micro-batch of a decoder that is trained as a whole; see `DecoderStep`."""

    backbone: PreTrainedConfig
    attention: AttentionConfig
    element: int
    rows: int
    sequence: int
    degree: int = 1
    recompute: bool = False
    trainable: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence // self.degree

    @property
    def head_dim(self) -> int:
        return head_dim(self.backbone)

    @property
    def kv_width(self) -> int:
        return kv_width(self.backbone)


def decoder_bytes(step: TrainedDecoder) -> tuple[int, int]:
    """(kept, at work): what waits for the backward pass, and the most that a part of the step makes beside it.

    With recomputation a block is whole one at a time: its saved tensors then count as work.
    """
    layers, hidden = step.backbone.num_hidden_layers, step.element * step.backbone.hidden_size * step.tokens
    block, block_work = block_bytes(step)
    head, head_work = head_bytes(step)
    if step.recompute:
        return hidden * layers + plan_bytes(step), max(hidden + block + block_work, head + head_work)
    return layers * block + plan_bytes(step), max(hidden + block_work, head + head_work)


def plan_bytes(step: DecoderStep) -> int:
    """Rotations and ids, which every rank has of whole sequences: the attention plan and the batch."""
    attention = step.attention
    windowed = attention.kind == "window"
    tokens = step.rows * step.sequence
    # Cosines and sines in float32; sinks have rotations of their own, and so have the keys that are carried.
    rotations = 4 * step.head_dim * (tokens * (2 if windowed and attention.sinks else 1))
    rotations += 4 * step.head_dim * step.rows * attention.window if windowed else 0
    return rotations + 32 * tokens


def block_bytes(step: DecoderStep) -> tuple[int, int]:
    """(saved, made by the backward pass) of a decoder block.

    Norms keep their float32 input, and their float32 output when it is trained. Attention keeps q, k and v rotated, its
    output, and with sinks q before rotation. The feed-forward part keeps the gate before and after its activation and
    what it multiplies, and a trained block the inputs of its matrices too. Backward, either a norm holds float32
    gradients beside all of it, or the feed-forward part those of its three inner tensors.
    """
    element, width, inner = step.element, step.backbone.hidden_size, step.backbone.intermediate_size
    attention, norms = step.attention, 4 * norm_width(step.backbone)
    queries = 2 + (attention.kind == "window" and attention.sinks > 0)
    saved = element * (queries * attention_width(step.backbone) + 2 * step.kv_width) + norms + 3 * element * inner
    norm, released = 20 * width, 4 * width
    if step.trainable:
        # The input of a block that is recomputed is kept already.
        saved += (2 + (not step.recompute)) * element * width + norms + element * inner
        norm, released = 16 * width, 8 * width + element * inner
    work = max(norm, 3 * element * inner - released)
    window = attention.window if attention.kind == "window" else 0
    carried = 2 * element * step.kv_width * window * step.rows // step.degree
    return step.tokens * saved + carried, step.tokens * work


def head_bytes(step: DecoderStep) -> tuple[int, int]:
    """(saved, made beside it) of the last norm and the loss: the gradient of its input, and of the head when trained.

    The loss holds a tile of logits and its gradient at a time, and the norm's backward pass float32 gradients.
    """
    element, width = step.element, step.backbone.hidden_size
    hidden = step.tokens * width
    tile = element * min(LOGIT_BYTES // 4, step.backbone.vocab_size * step.tokens)
    if not step.trainable:
        return hidden * (4 + element), max(20 * hidden, 2 * tile)
    # Its gradient is summed in float32, and a tile's part of it is made in the model's type.
    head = step.backbone.vocab_size * width
    return hidden * (8 + element) + 4 * head, max(20 * hidden, 2 * tile, tile + element * head)
