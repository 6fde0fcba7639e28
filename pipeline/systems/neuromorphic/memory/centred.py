"""What tells a token from the others of its span."""

from __future__ import annotations

from torch import Tensor


def centred(x: Tensor, counted: Tensor) -> Tensor:
    """x [..., N, P, H] without the mean of its `counted` [N, P] bool tokens; as it is where a row counts none.

    What a layer gives has a direction that all tokens share. Were it in what a memory writes, every row would come to
    be that direction.
    """
    count = counted.sum(-1).clamp(min=1).to(x.dtype)
    return x - counted.to(x.dtype).unsqueeze(-2) @ x / count[:, None, None]
