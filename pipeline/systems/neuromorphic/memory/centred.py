"""What tells a token from the others of its span."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(x: Tensor, counted: Tensor) -> Tensor:
    """x [..., N, P, H] without the mean of its `counted` [N, P] bool tokens; as it is where a row counts none.

    What a layer gives has a direction that all tokens share. Were it in what a memory writes, every row would come to
    be that direction. In x's dtype, computed in float32 or wider.
    """
    # The mean is large beside what differs, so that its rounding would show in what is written.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = counted.sum(-1).clamp(min=1).to(wide.dtype)
    return (wide - counted.to(wide.dtype).unsqueeze(-2) @ wide / count[:, None, None]).to(x.dtype)
