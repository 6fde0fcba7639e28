"""The short causal convolution over packed documents."""

from __future__ import annotations

from torch import Tensor


def causal_convolution(tokens: Tensor, segments: Tensor, kernel: Tensor) -> Tensor:
    """tokens [batch, taps - 1 + length, heads, channels], segments [batch, taps - 1 + length], kernel [heads, taps,
    channels] give [batch, length, heads, channels]; no tap reaches into another document."""
    # Depthwise taps as shifted products: each is masked where it would reach into another document.
    tail = kernel.shape[1] - 1
    length = tokens.shape[1] - tail
    mixed = tokens[:, tail:] * kernel[:, tail]
    for start in range(tail):
        same = segments[:, start : start + length] == segments[:, tail:]
        mixed = mixed + tokens[:, start : start + length] * kernel[:, start] * same[:, :, None, None]
    return mixed
