"""What decoding keeps of texts between two tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from pipeline.lm.decoding import DecodingState
from pipeline.systems.neuromorphic.state import StreamState
from pipeline.systems.neuromorphic.stream_tensors import named, stream_state

LENGTHS, HELD, BEGIN, READ = "lengths", "held", "begin.", "read."


@dataclasses.dataclass
class TextState(DecodingState):
    """What is kept of texts, of the same size however long they are.

    Of the span that a text is in it has what a write needs of each token, so that none is computed again. A span is
    written when the first token behind it is known, which its last token was to predict.
    """

    begin: StreamState
    """Before the span that each text is in."""
    read: StreamState
    """`hidden`, `working` and `segment` after the last token; the memories are those of `begin`."""
    ids: Tensor
    """[rows, P]: the tokens of the span so far, as in all that follow."""
    segments: Tensor
    """[rows, P]."""
    x: Tensor
    """[rows, P, D]: their embeddings."""
    says: Tensor
    """[rows, P, D]: what the working memory says."""
    layers: Tensor
    """[rows, P, L + 1, B, H]: the input of the first layer, and the outputs of all."""
    nats: Tensor
    """[rows, P]: how surprising the token behind was, of all tokens but the last one."""
    behind: Tensor
    """[rows, vocabulary]: the logits behind the last token."""
    segment: Tensor
    """[rows]: the document of the next token."""
    position: Tensor
    """[rows]: its place in it."""
    read_tokens: Tensor
    """[rows] int64 on the CPU: tokens so far."""
    held: Tensor
    """[rows] int64 on the CPU: tokens of the span that are not written yet, 0 to P."""

    @property
    def rows(self) -> int:
        return len(self.read_tokens)

    @property
    def lengths(self) -> Tensor:
        return self.read_tokens

    def tensors(self) -> dict[str, Tensor]:
        now = {f"{READ}{name}": tensor for name, tensor in named(self.read).items() if _is_read(name)}
        buffers = {name: getattr(self, name) for name in BUFFERS}
        begin = {f"{BEGIN}{name}": tensor for name, tensor in named(self.begin).items()}
        return {LENGTHS: self.read_tokens, HELD: self.held, **buffers, **begin, **now}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> TextState:
        """The inverse of `tensors`."""
        begin = {name.removeprefix(BEGIN): tensor for name, tensor in tensors.items() if name.startswith(BEGIN)}
        now = begin | {name.removeprefix(READ): tensor for name, tensor in tensors.items() if name.startswith(READ)}
        buffers = {name: tensors[name] for name in BUFFERS}
        counts = {"read_tokens": tensors[LENGTHS].cpu(), "held": tensors[HELD].cpu()}
        return TextState(stream_state(begin), stream_state(now), **counts, **buffers)

    def become(self, other: TextState) -> None:
        """Takes all that `other` has."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


BUFFERS = ("ids", "segments", "x", "says", "layers", "nats", "behind", "segment", "position")


def _is_read(name: str) -> bool:
    return name in ("hidden", "segment") or name.startswith("working.")
