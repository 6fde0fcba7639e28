"""The variational bound of whole peptides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.noise import uniforms


def peptide_bound(
    kernel: Kernel,
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    lengths: Tensor,
    *,
    seed: int,
    domain: str,
    draw: Tensor,
    samples: int | None = None,
) -> Tensor:
    """An estimate of the bound on -log p(x_0 | length) in nats, [rows] float64, prior and reconstruction included.

    denoise(x_t [rows, L], t [rows]) gives logits [rows, L, K]; it is called once for each of samples timesteps: by
    default T, each of them once, and else one at random from each of so many equal parts of 1..T. The noise is one draw
    per timestep; what is averaged over peptides, or over draws, is unbiased. Call it under `torch.no_grad()`.
    """
    samples = kernel.T if samples is None else samples
    if samples < 1:
        raise ValueError(f"a bound from {samples} timesteps: at least 1")
    u = uniforms(seed, f"{domain}/bound", draw, samples)[..., 0]
    total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for part in range(samples):
        t = (1 + ((part + u[:, part]) * (kernel.T / samples)).long()).clamp(max=kernel.T)
        # A timestep may come up twice where there are more samples than timesteps: its noise must not.
        xt = kernel.corrupt(x0, t, lengths, seed, f"{domain}/bound/{part}", draw)
        total += kernel.terms(denoise(xt, t), x0, xt, t, lengths).vb.sum(-1, dtype=torch.float64)
    return total / samples + kernel.prior_bound(x0, lengths).sum(-1, dtype=torch.float64)
