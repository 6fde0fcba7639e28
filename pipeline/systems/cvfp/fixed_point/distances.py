"""How far contexts are from those of the pass before."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distances(contexts: Tensor, before: Tensor, kind: str) -> Tensor:
    """Of contexts [tokens, D] and of those of the same tokens in the pass before, [tokens].

    raw: the mean square of their difference over dimensions. cosine: 2 (1 - cos), which is the same of two contexts
    whose mean square is 1, as a norm without gain leaves them. Both go from 0 to 4, and are 2 of unrelated contexts.
    """
    if kind == "raw":
        return (contexts - before).square().mean(-1)
    return 2 - 2 * F.cosine_similarity(contexts, before, dim=-1)
