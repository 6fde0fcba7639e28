"""New peptides from a denoiser: lengths, then residues from noise back to timestep 0."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.noise import categorical, uniforms

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Logits [rows, L, K] of the letters of x_0, given x_t [rows, L] and t [rows]."""
Order = Literal["confidence", "random"]
DIVERGED = "its weights have diverged: give an earlier checkpoint"
FAR = 1e4
"""By how much the logit of the likeliest letter is above those of others at temperature 0: all of the probability."""


def guided(conditional: Denoise, unconditional: Denoise, guidance: float = 1.0) -> Denoise:
    """What a sampler is given in the place of the denoiser itself.

    guidance g: log p is (1 - g) log p(x_0 | x_t) + g log p(x_0 | x_t, condition) up to its normalisation, classifier-
    free guidance (Ho and Salimans, arXiv:2207.12598) with g = 1 + w. 1 is the condition's own distribution and 0 that
    without a condition; each then asks one denoiser alone.
    """

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return conditional(xt, t)
        without = unconditional(xt, t)
        return without if guidance == 0 else weighed(conditional(xt, t), without, guidance)

    return denoise


def weighed(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """(1 - guidance) times logits without a condition and guidance times those with it; -inf where both are."""
    never = torch.isneginf(conditional) & torch.isneginf(unconditional)
    return (unconditional + guidance * (conditional - unconditional)).masked_fill(never, -torch.inf)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Finite logits [..., K] divided by a temperature, less the largest of them, and none below -FAR; at 0, and where
    its inverse is not finite, the likeliest letter has all of the probability, of equals the first."""
    if temperature < torch.finfo(logits.dtype).tiny:
        return FAR * torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).clamp(min=-FAR)


@torch.no_grad()
def sample(
    kernel: Kernel,
    denoise: Denoise,
    lengths: Tensor,
    width: int,
    *,
    seed: int,
    domain: str,
    draw: Tensor,
    steps: int | None = None,
    order: Order = "confidence",
    temperature: float = 1.0,
) -> Tensor:
    """Peptides, [rows, width] int64 letters, 0 beyond their lengths [rows].

    Ancestral sampling through `kernel.ladder(steps)`, all T timesteps by default: each step draws from the mixture over
    the predicted x_0 of the exact posteriors. Fewer steps skip timesteps, exactly as far as residues do not depend on
    each other. `order`: which residues the absorbing kernel reveals first, those that the denoiser is surest of,
    whatever the temperature, or any; the letters are drawn either way, of `tempered` logits. A row is a function of
    (seed, domain, draw) and of what the denoiser says of that row alone. Raises UserError where its logits are not
    finite.
    """
    x = kernel.start(lengths, width, seed, domain, draw)
    for high, low in pairwise(kernel.ladder(kernel.T if steps is None else steps)):
        t, s = torch.full_like(lengths, high), torch.full_like(lengths, low)
        logits = denoise(x, t)
        if not bool(torch.isfinite(logits).all()):
            raise UserError(f"the model's logits are not finite: {DIVERGED}")
        letters = tempered(logits, temperature)
        if isinstance(kernel, AbsorbingKernel):
            x = kernel.step(letters, x, t, s, lengths, seed, domain, draw, order=order, sure=logits)
        else:
            x = kernel.step(letters, x, t, s, lengths, seed, domain, draw)
    return x


def draw_lengths(log_lengths: Tensor, least: int, most: int, *, seed: int, domain: str, draw: Tensor) -> Tensor:
    """Lengths, [rows] int64, from log p(length) up to its normalisation, [rows, longest + 1], restricted to
    least..most. Raises UserError where a row has no probability there, or is not finite."""
    if bool((torch.isnan(log_lengths) | torch.isposinf(log_lengths)).any()):
        raise UserError(f"the model's lengths are not finite: {DIVERGED}")
    length = torch.arange(log_lengths.shape[1], device=log_lengths.device)
    allowed = log_lengths.double().masked_fill((length < least) | (length > most), -torch.inf)
    if bool(torch.isneginf(allowed.amax(-1)).any()):
        raise UserError(
            f"--min-length {least} --max-length {most}: the model has seen no peptide of these lengths: widen the range"
        )
    return categorical(allowed.softmax(-1), uniforms(seed, f"{domain}/length", draw, 1)[:, 0, 0])
