"""Likelihoods by the logits of a causal language model of transformers, whole in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.data.batch import IGNORED
from pipeline.downstream.requests import Likelihood, Request, groups, rows_of, width_of

TOKENS = 8192
"""Tokens that are read side by side, padding included, unless one text has more."""
LOGITS = 2**27
"""Logits of them at most, where more than one text is read."""


class LogitsScorer:
    """A model with `model(ids).logits`, [rows, tokens, vocabulary] of ids [rows, tokens], and a `config` of
    transformers. It is causal: what stands behind a text changes nothing in it."""

    def __init__(self, model: Any, padding: int, limit: int | None) -> None:
        """`padding`: an id of the vocabulary that stands behind texts. `limit`: as in `Scorer`."""
        self.model, self.padding, self.limit = model, padding, limit

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        device = next(self.model.parameters()).device
        widths = [width_of(request, self.limit) for request in requests]
        found: dict[int, Likelihood] = {}
        tokens = min(TOKENS, LOGITS // self.model.config.get_text_config().vocab_size)
        for members, width in groups(widths, tokens):
            ids, labels = rows_of([requests[number] for number in members], self.limit, width, self.padding)
            logits = self.model(ids.to(device)).logits
            for row, number in enumerate(members):
                places = (labels[row] != IGNORED).nonzero().flatten().to(device)
                wanted = labels[row].to(device)[places]
                # At least float32: probabilities of a model in bfloat16 would be too coarse to add up.
                chosen = logits[row, places]
                chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)
                own = chosen.gather(1, wanted[:, None]).double().sum()
                found[number] = Likelihood(float(own), bool((chosen.argmax(-1) == wanted).all()))
        return [found[number] for number in range(len(requests))]
