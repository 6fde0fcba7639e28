"""Which token comes next: temperature, top-k, top-p, and noise that is a function of seed, text and position."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from a model's logits; in the order of the fields."""

    temperature: float = 1.0
    """Divides the logits: below 1 likely tokens become likelier; 0: the likeliest token always."""
    top_k: int = 0
    """Draw from the K likeliest tokens alone; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this share of the probability (nucleus sampling, arXiv
    1904.09751); 1: from all."""
    seed: int = 0
    """The same seed draws the same text for a prompt at its place among the prompts, whatever the others are."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: give 0 or more")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: give a share above 0, at most 1")

    def choose(self, logits: Tensor, texts: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The next token of each row of logits [rows, vocabulary]; texts and positions [rows] are the index of the
        row's prompt and the number of tokens before the one that is drawn. Raises UserError for logits that are not
        finite.

        A row's token depends on its own logits, text and position alone.
        """
        if not bool(torch.isfinite(logits).all()):
            raise UserError("the model's logits are not finite: its weights have diverged: give an earlier checkpoint")
        if self.temperature == 0:
            return [int(i) for i in logits.argmax(dim=-1)]
        return [self._draw(*row) for row in zip(logits, texts, positions, strict=True)]

    def _draw(self, logits: Tensor, text: int, position: int) -> int:
        """The token whose waiting time is least, where tokens wait exponentially at the rate of their probability: each
        is the first with just that probability. Noise of a token's own, other than one number for all, makes it the
        same of a vocabulary that is padded otherwise."""
        tokens, probabilities = (part.cpu() for part in self.distribution(logits))
        waiting = self.noise(text, position, len(logits))[tokens] / probabilities
        return int(tokens[waiting.argmin()])

    def noise(self, text: int, position: int, count: int) -> Tensor:
        """Independent exponential numbers of mean 1 for tokens 0 to count - 1, float64, that these and the seed decide
        on any machine."""
        digest = hashlib.blake2b(f"{self.seed}/{text}/{position}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
        return torch.from_numpy(generator.standard_exponential(count, method="inv"))

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits [vocabulary] and a temperature above 0: the tokens that may be drawn [candidates], and their
        probabilities, float64, which add up to 1."""
        # The likeliest at 0: no temperature is then too low.
        scaled = (logits.double() - logits.double().max()) / self.temperature
        if not self.top_k and self.top_p == 1:
            return torch.arange(len(scaled), device=scaled.device), scaled.softmax(dim=0)
        # Stable: of equals the lower token is first.
        tokens = torch.argsort(scaled, descending=True, stable=True)
        if self.top_k:
            tokens = tokens[: self.top_k]
        probabilities = scaled[tokens].softmax(dim=0)
        if self.top_p < 1:
            # What is likelier than the token leaves something of the share to reach.
            before = probabilities.cumsum(dim=0) - probabilities
            count = max(1, int((before < self.top_p).sum()))
            tokens, probabilities = tokens[:count], probabilities[:count] / probabilities[:count].sum()
        return tokens, probabilities
