"""The bound of whole peptides with exact denoisers, whose mean is the entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.bound import peptide_bound
from pipeline.systems.mimir.diffusion.noise import categorical, uniforms
from pipeline.systems.mimir.diffusion.uniform import UniformKernel
from tests.systems.mimir.diffusion.reference import exact_prediction, swiss_prot
from tests.systems.mimir.diffusion.words import ENTROPY, LENGTH, SHARES, WORDS, K, exact_denoiser

ROWS = 600
DRAW = torch.arange(ROWS)


@pytest.mark.parametrize("samples", [None, 4, 25])
def test_independent_residues_under_uniform_noise(samples: int | None) -> None:
    f = torch.from_numpy(swiss_prot(20))
    lengths = DRAW % 9 + 1
    x0 = categorical(f.expand(ROWS, 9, 20), uniforms(5, "data", DRAW, 9)[..., 0]) * (torch.arange(9) < lengths[:, None])
    exact = torch.stack([torch.from_numpy(exact_prediction(f.numpy(), 10, t)) for t in range(11)]).log()
    kernel, seen = UniformKernel(10, 20), []

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return exact[t[:, None], xt]

    bounds = peptide_bound(kernel, denoise, x0, lengths, seed=1, domain="a", draw=DRAW, samples=samples)
    assert len(seen) == (samples or 10) and bounds.dtype == torch.float64
    if samples is None:
        assert all(torch.equal(t, torch.full_like(DRAW, index + 1)) for index, t in enumerate(seen))
    else:
        assert torch.stack(seen).min() == 1 and torch.stack(seen).max() == 10
    excess = bounds - 2.888657 * lengths
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / ROWS**0.5
    two = slice(7, 9)
    again = peptide_bound(kernel, denoise, x0[two], lengths[two], seed=1, domain="a", draw=DRAW[two], samples=samples)
    torch.testing.assert_close(again, bounds[two])


@pytest.mark.parametrize("samples", [None, 3])
def test_dependent_letters_under_masks(samples: int | None) -> None:
    x0 = WORDS[categorical(SHARES.expand(ROWS, -1), uniforms(5, "data", DRAW, 1)[:, 0, 0])]
    lengths = torch.full_like(DRAW, LENGTH)
    kernel = AbsorbingKernel(6, K)
    bounds = peptide_bound(
        kernel, lambda xt, t: exact_denoiser(xt), x0, lengths, seed=1, domain="a", draw=DRAW, samples=samples
    )
    assert abs(float(bounds.mean()) - ENTROPY) < 4 * float(bounds.std()) / ROWS**0.5


def test_no_samples_are_refused() -> None:
    x0, lengths = DRAW[:1, None], DRAW[1:2]
    with pytest.raises(ValueError, match="0 timesteps"):
        peptide_bound(UniformKernel(3, 4), lambda xt, t: xt, x0, lengths, seed=0, domain="a", draw=DRAW[:1], samples=0)
