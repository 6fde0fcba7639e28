"""The truth that every backend of the affine scan is held to: the recurrence as written, token by token."""

import torch
from torch import Tensor


def affine_loop(
    a: Tensor, b: Tensor, *, state: Tensor | None = None, segment_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``affine_scan``, same shapes and meaning, in float64 whatever the inputs are."""
    a, b = a.double(), b.double()
    h = torch.zeros_like(b[:, 0]) if state is None else state.double()
    outputs = []
    for t in range(b.shape[1]):
        if segment_ids is not None and t > 0:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            h = torch.where(same.view(-1, *[1] * (h.dim() - 1)), h, 0.0)
        h = a[:, t] * h + b[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


def affine_loop_gradients(
    a: Tensor, h: Tensor, state: Tensor, grad_h: Tensor, grad_after: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and state, in float64, by the chain rule along the loop; h is the loop's."""
    a, h, g = a.double(), h.double(), grad_after.double()
    grad_a, grad_b = torch.empty_like(h), torch.empty_like(h)
    for t in reversed(range(h.shape[1])):
        g = g + grad_h[:, t].double()
        grad_b[:, t] = g
        before = h[:, t - 1] if t else state.double()
        if segment_ids is not None and t > 0:
            same = (segment_ids[:, t] == segment_ids[:, t - 1]).view(-1, *[1] * (g.dim() - 1))
            g, before = torch.where(same, g, 0.0), torch.where(same, before, 0.0)
        grad_a[:, t] = grad_b[:, t] * before
        g = a[:, t] * g
    return grad_a, grad_b, g
