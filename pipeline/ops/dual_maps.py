"""Error maps and links of the chunk-start scan: what is descended on, and how the dual state becomes a memory.

An error map turns errors e = k W - v [..., value dim] into error signals R of the same shape; a token's gradient is
k^T R. A link turns dual states A [..., key dim, value dim] into memories W of the same shape.

Source: MIRAS (arXiv 2504.13173), the variants MONETA, YAAD and MEMORA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

ErrorMap = Callable[[Tensor, Tensor | None], Tensor]
"""(errors [..., value dim], thresholds [..., 1] or None) -> error signals [..., value dim]."""


class Link(Protocol):
    """Dual states [..., key dim, value dim] -> memories of the same shape."""

    copies: ClassVar[int]
    """Tensors of that shape that making one, linking it and reading it leave for the backward pass."""

    def __call__(self, dual: Tensor) -> Tensor: ...


def squared_error(error: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Signal of 1/2 |e|^2, the loss of the exact rules: the error itself."""
    return error


@dataclass(frozen=True)
class PNormError:
    """Signal of |e|_p^p: p sign(e) |e|^(p - 1). With p = 2 it is twice that of `squared_error`.

    ``smooth`` replaces what is not smooth at 0: ``sqrt`` takes |e| as sqrt(e^2 + eps), so the signal is
    p e (e^2 + eps)^((p - 2) / 2), that of sum (e^2 + eps)^(p / 2); ``tanh`` takes sign(e) as tanh(sharpness e) and |e|
    as before. ``none`` needs p of 2 or more: below, the signal's slope at 0 is infinite.
    """

    p: float = 3.0
    smooth: Literal["none", "sqrt", "tanh"] = "none"
    epsilon: float = 1e-6
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        if self.smooth not in ("none", "sqrt", "tanh"):
            raise ValueError(f"smooth is {self.smooth!r}; expected 'none', 'sqrt' or 'tanh'")
        if self.p < 1 or (self.p < 2 and self.smooth == "none"):
            raise ValueError(f"p is {self.p}; expected 2 or more, or 1 or more with smooth 'sqrt' or 'tanh'")

    def __call__(self, error: Tensor, threshold: Tensor | None = None) -> Tensor:
        if self.smooth == "none":
            return self.p * error.sign() * error.abs().pow(self.p - 1)
        magnitude = error * error + self.epsilon
        if self.smooth == "sqrt":
            return self.p * error * magnitude.pow((self.p - 2) / 2)
        return self.p * torch.tanh(self.sharpness * error) * magnitude.pow((self.p - 1) / 2)


@dataclass(frozen=True)
class HuberError:
    """Signal of the Huber loss with threshold delta, continuous at it.

    ``elementwise``: every component is cut at delta, max(-delta, min(e, delta)). ``norm``: e while |e| is at most
    delta, else delta e / |e|. The thresholds are positive.
    """

    form: Literal["elementwise", "norm"] = "elementwise"

    def __post_init__(self) -> None:
        if self.form not in ("elementwise", "norm"):
            raise ValueError(f"form is {self.form!r}; expected 'elementwise' or 'norm'")

    def __call__(self, error: Tensor, threshold: Tensor | None = None) -> Tensor:
        assert threshold is not None
        if self.form == "elementwise":
            return torch.minimum(torch.maximum(error, -threshold), threshold)
        return error * shrink(error.square().sum(dim=-1, keepdim=True), threshold)


def shrink(squared_norm: Tensor, largest: Tensor | float) -> Tensor:
    """min(1, largest / norm), the factor that cuts a norm at ``largest``; its gradient is finite at a norm of 0."""
    over = squared_norm > largest * largest
    # The branch that is not taken must have a finite gradient too.
    return torch.where(over, largest * torch.where(over, squared_norm, 1.0).rsqrt(), 1.0)


@dataclass(frozen=True)
class QNormLink:
    """Link of q-norm retention. The norm runs over the whole matrix; 2 is the identity.

    ``mirror``: |A|_q^(2 - q) |A|^(q - 1) sign(A), the gradient of 1/2 |A|_q^2, hence the exact mirror map of the
    regulariser 1/2 |W|_r^2 with 1/r + 1/q = 1. It is of degree 1: W is as large as A, and its slope is bounded.
    ``printed``: A / |A|_q^(q - 2), as the paper has it: of degree 3 - q, so above q = 3 it grows without bound near
    A = 0, and the smaller the dual state, the larger the memory.

    Norms are floored: n^q = |A|_q^q + epsilon^q. An empty dual state then gives an empty memory, with finite gradients.
    """

    copies: ClassVar[int] = 9
    q: float = 4.0
    form: Literal["mirror", "printed"] = "mirror"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.form not in ("mirror", "printed"):
            raise ValueError(f"form is {self.form!r}; expected 'mirror' or 'printed'")
        if self.q < 2:
            raise ValueError(f"q is {self.q}; expected 2 or more")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; expected a value above 0")

    def __call__(self, dual: Tensor) -> Tensor:
        # Powers of numbers scaled by the largest: |A|^q alone leaves the range of float32 at |A| of 1e-10. The norm
        # does not depend on the scale, so its gradient does not run through it.
        size = dual.abs()
        scale = size.detach().amax(dim=(-2, -1), keepdim=True).clamp_min(self.epsilon)
        powers = (size / scale).pow(self.q).sum(dim=(-2, -1), keepdim=True)
        norm = scale * (powers + (self.epsilon / scale).pow(self.q)).pow(1 / self.q)
        if self.form == "printed":
            return dual / norm.pow(self.q - 2)
        return dual.sign() * (size / norm).pow(self.q - 1) * norm


@dataclass(frozen=True)
class SoftmaxLink:
    """Link of entropy retention: every row of W (a key component's values) is ``scale`` times a softmax of A's row.

    The logits need no normalisation: softmax does not see what is added to a row. An empty dual state gives the
    uniform memory, scale / value dim.
    """

    copies: ClassVar[int] = 3
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; expected a value above 0")

    def __call__(self, dual: Tensor) -> Tensor:
        return self.scale * torch.softmax(dual, dim=-1)
