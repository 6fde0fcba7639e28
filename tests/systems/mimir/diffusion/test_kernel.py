"""What both kernels share: timesteps, the curriculum, the sampler's steps and the choice by a config."""

from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.choice import create_kernel
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.uniform import UniformKernel

DRAWS = torch.arange(4000)
TWELVE = torch.full_like(DRAWS, 12)
both = pytest.mark.parametrize("kernel", [UniformKernel(20, 24), AbsorbingKernel(20, 24)], ids=["uniform", "absorbing"])


@both
def test_timesteps_are_uniform(kernel: Kernel) -> None:
    t = kernel.timesteps(0, "train", DRAWS, TWELVE)
    counts = t.bincount(minlength=21)
    assert counts[0] == 0 and counts.sum() == 4000 and len(counts) == 21
    assert ((counts[1:] - 200) ** 2 / 200).sum() < 43.8  # chi-square with 19 degrees of freedom, 0.1 %


@pytest.mark.parametrize(
    "progress, noisiest", [(0.0, 1), (0.04, 1), (0.06, 2), (0.5, 10), (0.999, 19), (1.0, 20), (7.0, 20)]
)
def test_the_curriculum_raises_the_noisiest_timestep(progress: float, noisiest: int) -> None:
    kernel = AbsorbingKernel(20, 24)
    t = kernel.timesteps(0, "train", DRAWS, TWELVE, progress)
    assert set(t.tolist()) == set(range(1, noisiest + 1))
    rows = kernel.timesteps(0, "train", DRAWS, TWELVE, torch.full((4000,), progress, dtype=torch.float64))
    assert torch.equal(t, rows)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 99])
def test_the_ladder_leads_from_the_noisiest_to_the_peptide(steps: int) -> None:
    ladder = UniformKernel(10, 24).ladder(steps)
    assert ladder[0] == 10 and ladder[-1] == 0 and len(ladder) == min(steps, 10) + 1
    gaps = {high - low for high, low in itertools.pairwise(ladder)}
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 timesteps"):
        UniformKernel(0, 24)
    with pytest.raises(ValueError, match="1 letters"):
        AbsorbingKernel(20, 1)
    with pytest.raises(ValueError, match="0 steps"):
        UniformKernel(10, 24).ladder(0)


@both
def test_rows_know_nothing_of_each_other(kernel: Kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 9, 20])
    active = torch.arange(20) < lengths[:, None]
    x0 = torch.randint(24, (4, 20), generator=generator) * active
    logits = torch.randn(4, 20, 24, generator=generator)
    draw = torch.tensor([9, 2, 77, 5])
    t = kernel.timesteps(3, "train", draw, lengths)

    def all_of(rows: slice) -> list[torch.Tensor]:
        xt = kernel.corrupt(x0[rows], t[rows], lengths[rows], 3, "train", draw[rows])
        terms = kernel.terms(logits[rows], x0[rows], xt, t[rows], lengths[rows])
        counts = kernel.counts(t[rows], lengths[rows])
        step = kernel.step(logits[rows], xt, t[rows], t[rows] - 1, lengths[rows], 3, "draw", draw[rows])
        start = kernel.start(lengths[rows], 20, 3, "draw", draw[rows])
        return [t[rows], xt, terms.ce, terms.vb, terms.mask, counts.ce, counts.vb, step, start]

    whole = all_of(slice(None))
    for row in range(4):
        for batched, alone in zip(whole, all_of(slice(row, row + 1)), strict=True):
            torch.testing.assert_close(batched[row : row + 1], alone)
    beyond = ~active
    for ids in (whole[1], whole[7], whole[8]):
        assert ids[beyond].eq(0).all() and ids[active].ge(0).all() and ids[active].lt(kernel.states).all()
    for loss in whole[2:5]:
        assert loss[beyond].eq(0).all()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_with_in_single(kernel: Kernel, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(8, 20, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    lengths, t, draw = torch.full((8,), 20), torch.tensor([1, 2, 3, 5, 10, 15, 19, 20]), torch.arange(8)
    x0 = torch.randint(24, (8, 20), generator=torch.Generator().manual_seed(1))
    xt = kernel.corrupt(x0, t, lengths, 0, "train", draw)
    half, single = (kernel.terms(each, x0, xt, t, lengths) for each in (logits, logits.float()))
    assert half.ce.dtype == half.vb.dtype == torch.float32
    assert torch.equal(half.ce, single.ce) and torch.equal(half.vb, single.vb)
    assert kernel.reverse(logits, xt, t, t - 1, lengths).dtype == torch.float32


@both
def test_an_empty_row_is_nothing(kernel: Kernel) -> None:
    lengths, t, draw = torch.tensor([0, 5]), torch.tensor([4, 4]), torch.arange(2)
    x0 = torch.zeros(2, 6, dtype=torch.int64)
    xt = kernel.corrupt(x0, t, lengths, 0, "train", draw)
    terms, counts = kernel.terms(torch.zeros(2, 6, 24), x0, xt, t, lengths), kernel.counts(t, lengths)
    assert terms.ce[0].eq(0).all() and terms.vb[0].eq(0).all() and counts.ce[0] == counts.vb[0] == 0
    assert terms.ce[1].isfinite().all() and counts.ce[1] > 0


def test_a_config_says_which_kernel() -> None:
    uniform = create_kernel(MimirConfig(timesteps=7, letters="ACD"))
    assert isinstance(uniform, UniformKernel) and (uniform.T, uniform.K, uniform.states) == (7, 3, 3)
    absorbing = create_kernel(MimirConfig(kernel="absorbing", timesteps=21, mask_weight=1.5))
    assert isinstance(absorbing, AbsorbingKernel) and (absorbing.T, absorbing.K, absorbing.states) == (21, 24, 25)
    assert absorbing.mask_weight == 1.5
    assert uniform.level(torch.tensor([1, 7])).tolist() == [1.0, 7.0]
