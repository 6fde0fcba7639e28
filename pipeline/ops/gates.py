"""Gates of the memory in the region where it cannot grow.

One learned momentum eta per head, step size theta_t = step beta_t (1 - eta)^2 with beta_t = sigmoid(.), forget rate
alpha_t <= 0.01. For the exact rules, `titans` and `delta`, step is 0.9: for unit keys a fixed quadratic norm of (error,
momentum) then never grows, whatever the keys (tests/ops/test_scan_stability.py derives and checks it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_FORGET = 0.01
"""Largest forget rate per token."""
MAX_MOMENTUM = 0.99
"""Largest momentum: nearer to 1 the norm that bounds the state holds for smaller forget rates only."""
STEP_MARGIN = 0.9
"""Largest step size, as a share of (1 - eta)^2."""
STRETCH = 0.1
"""How far a stretched sigmoid goes beyond 0 and 1 before it is cut (hard concrete gates, arXiv 1712.01312, eq. 10)."""


@dataclass(frozen=True)
class Gates:
    """Forget rate, momentum and step size, each [batch, sequence, heads] in float32 (float64 for float64 inputs)."""

    alpha: Tensor
    eta: Tensor
    theta: Tensor


def bounded_gates(
    alpha_logits: Tensor,
    beta_logits: Tensor,
    eta_logits: Tensor | None,
    step: float = STEP_MARGIN,
    stretch: float = 0.0,
) -> Gates:
    """Gates from logits; alpha and beta logits [batch, sequence, heads], eta logits [heads] (None: no momentum).

    step is the largest step size without momentum. With a `stretch` above 0 the step sizes come from a stretched
    sigmoid, cut at 0 and 1 (`stretched_sigmoid`): a token can then write nothing at all. The forget rates do not.
    """
    dtype = torch.float64 if beta_logits.dtype == torch.float64 else torch.float32
    eta = (
        beta_logits.new_zeros((), dtype=dtype)
        if eta_logits is None
        else MAX_MOMENTUM * torch.sigmoid(eta_logits.to(dtype))
    )
    beta = torch.sigmoid(beta_logits.to(dtype))
    if stretch:
        beta = stretched_sigmoid(beta, stretch)
    theta = step * beta * (1 - eta) ** 2
    alpha = MAX_FORGET * torch.sigmoid(alpha_logits.to(dtype))
    return Gates(alpha, eta.expand_as(theta), theta)


def stretched_sigmoid(share: Tensor, stretch: float = STRETCH) -> Tensor:
    """A sigmoid's values in (0, 1), spread to (-stretch, 1 + stretch) and cut at 0 and 1 (arXiv 1712.01312, eq. 10).

    Where it is cut its gradient is 0; just above the cut the slope is not 0, so that a gate that should
    close does so in finitely many steps. A sigmoid only comes near 0, with a slope that vanishes as it does.
    """
    return ((1 + 2 * stretch) * share - stretch).clamp(0, 1)


class GateLinear(nn.Linear):
    """A projection to gate logits in float32 (float64 for float64), also under autocast: a step of bfloat16 is 6 % of
    the forget rate of a long memory."""

    def forward(self, x: Tensor, norm_eps: float | None = None) -> Tensor:
        """Of x, or with `norm_eps` of x over its root mean square, as `torch.nn.functional.rms_norm` has it."""
        accumulate_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert self.bias is not None
        with torch.autocast(device_type=x.device.type, enabled=False):
            weight, bias = self.weight.to(accumulate_dtype), self.bias.to(accumulate_dtype)
            if norm_eps is None:
                return F.linear(x.to(accumulate_dtype), weight, bias)
            projected: Tensor = _NormedLinear.apply(x, weight, norm_eps)
            return projected + bias


class _NormedLinear(torch.autograd.Function):
    """x W^T / rms(x) of x [..., width] and W [outputs, width] in the precision of W: [..., outputs].

    Autograd would keep x twice more in that precision, and pass over it several times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
        inverse = torch.rsqrt(size.square() / x.shape[-1] + eps)
        # A token's factor passes through the projection, whose output is the smaller one to multiply.
        out = F.linear(x.to(weight.dtype), weight) * inverse
        ctx.save_for_backward(x, weight, inverse, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse, out = ctx.saved_tensors
        wide, scaled = x.to(weight.dtype), grad * inverse
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # d inverse / d x = -x inverse^3 / width, of which `out` has one factor.
            along = (grad * out).sum(dim=-1, keepdim=True) * inverse.square() / x.shape[-1]
            grad_x = torch.addcmul(scaled @ weight, wide, along, value=-1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = scaled.flatten(0, -2).T @ wide.flatten(0, -2)
        return grad_x, grad_weight, None


def logit(probability: float) -> float:
    """Inverse of the sigmoid."""
    return math.log(probability / (1 - probability))


def initial_eta_logit(momentum: float) -> float:
    """The logit of an initial momentum below MAX_MOMENTUM."""
    return logit(momentum / MAX_MOMENTUM)


def initial_beta_logits(heads: int, momentum: float, step_size: tuple[float, float], stretch: float = 0.0) -> Tensor:
    """Biases [heads] that give the heads step sizes spread on a log scale from the first to the second.

    With another largest step than STEP_MARGIN they are that much larger or smaller: the logits stay the same.
    `stretch` is that of `bounded_gates`.
    """
    shares = [min(0.999, theta / (STEP_MARGIN * (1 - momentum) ** 2)) for theta in _log_spread(step_size, heads)]
    if stretch:
        shares = [(share + stretch) / (1 + 2 * stretch) for share in shares]
    return torch.tensor([logit(share) for share in shares])


def initial_alpha_logits(heads: int, half_life: tuple[float, float]) -> Tensor:
    """Biases [heads] that give the heads forget half-lives spread on a log scale, in tokens."""
    rates = [-math.expm1(-math.log(2) / life) for life in _log_spread(half_life, heads)]
    return torch.tensor([logit(min(0.999, rate / MAX_FORGET)) for rate in rates])


def _log_spread(ends: tuple[float, float], count: int) -> list[float]:
    first, last = map(math.log, ends)
    return [math.exp(first + (last - first) * index / max(1, count - 1)) for index in range(count)]
