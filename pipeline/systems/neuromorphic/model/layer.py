"""The gated recurrent layer of all columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.ops.affine_scan import affine_scan
from pipeline.systems.neuromorphic.columns import ColumnFeedForward, ColumnLinear, ColumnNorm

LOW, HIGH = 0.05, 0.95
"""Outside of these a gate counts as saturated."""


class Gates(NamedTuple):
    """Of every token, each [B, N, P, H]."""

    a: Tensor
    """What is kept of h, 0 to 1, in the dtype of state."""
    b: Tensor
    """tanh(W_b u), before it is scaled by 1 - a."""
    h: Tensor

    def statistics(self) -> dict[str, Tensor]:
        """Detached means over rows and tokens, each [B]."""
        a, b, h = (x.detach().float() for x in self)
        values = {
            "gate_a_mean": a.mean(-1), "gate_a_saturation": ((a < LOW) | (a > HIGH)).float().mean(-1),
            "gate_b_mean": b.mean(-1), "gate_b_magnitude": b.abs().mean(-1), "h_norm": h.norm(dim=-1),
        }  # fmt: skip
        return {name: value.mean((1, 2)) for name, value in values.items()}


class GatedLayer(nn.Module):
    """h_t = a_t h_{t-1} + b_t for each column, with a and b from the layer's input and what the memories say, then an
    output projection around which the input goes, a norm and a feed-forward part.

    The gates read u = [x; y_pm; context; surprise] but never h, so the recurrence is an elementwise affine scan.
    b is tanh(W_b u) (1 - a), so that |h| stays below 1; `scaled` False: b = tanh(W_b u), as published.
    """

    def __init__(self, columns: int, width: int, *, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.gates = ColumnLinear(columns, 4 * width, 2 * width)
        self.surprise = nn.Parameter(torch.empty(columns, 2 * width))
        self.output = ColumnLinear(columns, width, width)
        self.norm = ColumnNorm(columns, width)
        self.feed_forward = ColumnFeedForward(columns, width)

    def forward(
        self, x: Tensor, procedural: Tensor, context: Tensor, surprise: Tensor, hidden: Tensor, segment_ids: Tensor
    ) -> tuple[Tensor, Tensor, Gates]:
        """The layer over the P tokens of a span.

        x and procedural [B, N, P, H]: the layer's input and what its procedural memory says; context [B, N, P, 2H]:
        what the working and the episodic memory say; surprise [N, P] nats; hidden [N, B, H], h of the token before, in
        the dtype of state; segment_ids [N, P]: h restarts at zero where the id differs from the token before, and
        `hidden` is of the first token's document. Returns the output like x, h after the last token [N, B, H],
        and the gates.
        """
        columns, rows, tokens, width = x.shape
        mixed = self.gates(x, procedural, context)
        mixed = mixed + surprise[..., None].to(x.dtype) * self.surprise[:, None, None]
        # In bfloat16 a factor above 0.998 is 1, and nothing is ever forgotten.
        a = torch.sigmoid(mixed[..., :width].to(hidden.dtype))
        b = torch.tanh(mixed[..., width:])
        # Not b (1 - a), which would keep 1 - a for the backward pass.
        added = (b - b * a).to(x.dtype) if self.scaled else b
        flat = (columns * rows, tokens, width)
        h, after = affine_scan(
            a.reshape(flat),
            added.reshape(flat),
            state=hidden.transpose(0, 1).reshape(columns * rows, width),
            segment_ids=segment_ids.expand(columns, rows, tokens).reshape(columns * rows, tokens),
        )
        h = h.view(x.shape)
        out = self.feed_forward(self.norm(self.output(h) + x))
        return out, after.view(columns, rows, width).transpose(0, 1), Gates(a, b, h)
