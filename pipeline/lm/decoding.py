"""What reads text token by token: the interface of decoders, and of the state that they keep of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor


class DecodingState(ABC):
    """What a decoder keeps of the rows of text that it has read. `read`, `logits` and `step` change it in place; rows
    are apart: none depends on what else is in the batch."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Texts in it."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """Tokens read so far, [rows] int64 on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, rows first in each: what a file of it holds, and what `Decoder.restore` takes."""


class Decoder(ABC):
    """A model in evaluation mode that reads tokens and says what may come next."""

    vocab_size: int
    """Logits per token; there may be more than the tokenizer has ids."""
    limit: int | None = None
    """Tokens of a text at the most, prompt and what is generated; None: any number."""

    @abstractmethod
    def empty(self, rows: int) -> DecodingState:
        """The state of texts of which nothing has been read."""

    @abstractmethod
    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        """Goes on with ids [rows, tokens] int64, piece by piece; gives the logits behind the last token, [rows,
        vocabulary] in float32 (float64 of a model in float64). Memory in use does not grow with the tokens where the
        state does not."""

    @abstractmethod
    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        """As `read`, with the logits behind every token, [rows, tokens, vocabulary]."""

    @abstractmethod
    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        """Goes on with one token per row, ids [rows]; logits [rows, vocabulary], which the next step may overwrite."""

    @abstractmethod
    def select(self, state: DecodingState, rows: Tensor) -> DecodingState:
        """Copies of rows by index [rows] int64: reordered, repeated or left out."""

    @abstractmethod
    def join(self, states: Sequence[DecodingState]) -> DecodingState:
        """One state of all their rows, which may be of different lengths."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> DecodingState:
        """The inverse of `DecodingState.tensors`, on the model's device. Raises ValueError for what is not of this
        model: it names the tensor."""
