"""The truth that every backend of the memory op is held to: the rule as written, token by token, plain autograd."""

import torch
from torch import Tensor


def token_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The rule ``titans`` of ``miras_scan``, same shapes and meaning, in float64 whatever the inputs are."""
    q, k, v, alpha, eta, theta = (x.double() for x in (q, k, v, alpha, eta, theta))
    batch, _, heads, key_dim = k.shape
    zeros = k.new_zeros(batch, heads, key_dim, v.shape[-1])
    memory, surprise = (zeros, zeros) if state is None else (part.double() for part in state)
    outputs = []
    # Apart at once: the gradient of an index is a tensor of the whole sequence, and there would be one for each token.
    gates = [gate[..., None, None].unbind(1) for gate in (alpha, eta, theta)]
    for t, (q_t, k_t, v_t, a, e, s) in enumerate(zip(q.unbind(1), k.unbind(1), v.unbind(1), *gates, strict=True)):
        if segment_ids is not None and t > 0:
            same = (segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None, None]
            memory, surprise = torch.where(same, memory, zeros), torch.where(same, surprise, zeros)
        read = torch.einsum("bhk,bhkv->bhv", k_t, memory)
        gradient = torch.einsum("bhk,bhv->bhkv", k_t, read - v_t)
        surprise = e * surprise - s * gradient
        memory = (1 - a) * memory + surprise
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, memory))
    return torch.stack(outputs, dim=1), (memory, surprise)


def delta_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    theta: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The rule ``delta``, in the inputs' dtype; returns y and (M, the last update).

    M_t = (1 - alpha_t) M_{t-1} + u_t with u_t = theta_t k_t^T (v_t - k_t M_{t-1}).
    """
    batch, sequence, heads, key_dim = k.shape
    memory = k.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state[0]
    update = torch.zeros_like(memory)
    outputs = []
    for t in range(sequence):
        error = v[:, t] - (k[:, t].unsqueeze(-1) * memory).sum(dim=-2)
        update = theta[:, t, :, None, None] * k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        memory = (1 - alpha[:, t])[..., None, None] * memory + update
        outputs.append((q[:, t].unsqueeze(-1) * memory).sum(dim=-2))
    return torch.stack(outputs, dim=1), (memory, update)
