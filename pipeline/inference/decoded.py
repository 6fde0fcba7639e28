"""The model of a system that generates text, and of which transformers has no class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.capabilities import Generates
from pipeline.lm.decoding import Decoder


@dataclass(frozen=True)
class DecodedConfig:
    """What is asked of a model's config."""

    vocab_size: int
    model: dict[str, Any]
    """The settings of the system."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Logits(NamedTuple):
    """What a call of the model gives."""

    logits: Tensor
    """[rows, tokens, vocabulary]."""


class Decoded(nn.Module):
    """Stands for a causal language model of transformers where text is read and written; whole, on one device."""

    def __init__(self, system: Generates, model: nn.Module) -> None:
        """`system`: that of the run which trained `model`. Raises UserError where it cannot write text."""
        super().__init__()
        self.model = model
        self._system = system
        settings: Any = system
        self.config = DecodedConfig(self.decoder().vocab_size, dataclasses.asdict(settings.config.model))

    def decoder(self) -> Decoder:
        """Decodes with the model as it is now."""
        return self._system.decoder(self.model)

    def forward(self, input_ids: Tensor) -> Logits:
        """Of ids [rows, tokens], each row a text from its beginning."""
        decoder = self.decoder()
        return Logits(decoder.logits(input_ids, decoder.empty(len(input_ids))))
