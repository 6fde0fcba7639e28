"""Masks as noise: how many, where, and a bound and a sampler that are exact with the exact denoiser."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch

from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from tests.systems.mimir.diffusion.reference import swiss_prot
from tests.systems.mimir.diffusion.words import ENTROPY, LENGTH, MASK, SHARES, WORDS, K, exact_denoiser


@pytest.mark.parametrize("T", [1, 7, 20, 50])
def test_as_many_residues_are_masked_as_the_timestep_says(T: int) -> None:
    kernel = AbsorbingKernel(T, 24)
    t, lengths = torch.cartesian_prod(torch.arange(T + 1), torch.arange(1, 21)).unbind(-1)
    x0 = torch.randint(24, (len(t), 20), generator=torch.Generator().manual_seed(0))
    active = torch.arange(20) < lengths[:, None]
    xt = kernel.corrupt(x0 * active, t, lengths, 0, "train", torch.arange(len(t)))
    expected = [math.ceil(step * length / T) for step, length in zip(t.tolist(), lengths.tolist(), strict=True)]
    assert (xt == 24).sum(-1).tolist() == expected == kernel.masked(t, lengths).tolist()
    assert xt[~active].eq(0).all() and torch.equal(xt[active & (xt < 24)], x0[active & (xt < 24)])


def test_every_set_of_positions_is_masked_equally_often() -> None:
    kernel, rows = AbsorbingKernel(6, 24), 6000
    lengths, t = torch.full((rows,), 4), torch.full((rows,), 3)
    xt = kernel.corrupt(torch.ones(rows, 6, dtype=torch.int64), t, lengths, 0, "train", torch.arange(rows))
    sets = ((xt == 24) * torch.tensor([1, 2, 4, 8, 16, 32])).sum(-1).bincount(minlength=64)
    expected = [sum(1 << place for place in pair) for pair in itertools.combinations(range(4), 2)]
    assert sets[expected].sum() == rows
    assert ((sets[expected] - 1000) ** 2 / 1000).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.1 %


@pytest.mark.parametrize("T", [3, 4, 11])
def test_the_exact_denoiser_has_the_entropy_as_its_bound(T: int) -> None:
    kernel = AbsorbingKernel(T, K)
    lengths = torch.full((len(WORDS),), LENGTH)
    total = 0.0
    for t in range(1, T + 1):
        steps = torch.full_like(lengths, t)
        hidden_sets = list(itertools.combinations(range(LENGTH), int(kernel.masked(steps, lengths)[0])))
        for hidden in hidden_sets:
            xt = WORDS.clone()
            xt[:, list(hidden)] = MASK
            terms = kernel.terms(exact_denoiser(xt), WORDS, xt, steps, lengths)
            assert torch.equal(terms.mask, xt == MASK)
            total += float(SHARES @ terms.vb.sum(-1)) / len(hidden_sets) / T
    assert total == pytest.approx(ENTROPY, abs=1e-9)
    assert kernel.prior_bound(WORDS, lengths).eq(0).all()


@pytest.mark.parametrize("T", [1, 2])
def test_residues_revealed_together_cost_more_than_the_entropy(T: int) -> None:
    kernel = AbsorbingKernel(T, K)
    lengths = torch.full((len(WORDS),), LENGTH)
    by_hand = total = 0.0
    for t in range(1, T + 1):
        steps = torch.full_like(lengths, t)
        masked, after = math.ceil(t * LENGTH / T), math.ceil((t - 1) * LENGTH / T)
        for hidden in itertools.combinations(range(LENGTH), masked):
            xt = WORDS.clone()
            xt[:, list(hidden)] = MASK
            log_p = exact_denoiser(xt)
            terms = kernel.terms(log_p, WORDS, xt, steps, lengths)
            of_word = log_p.gather(-1, WORDS[..., None])[..., 0][:, list(hidden)].mean(-1)
            by_hand -= float(SHARES @ of_word) * (masked - after) / math.comb(LENGTH, masked)
            total += float(SHARES @ terms.vb.sum(-1)) / math.comb(LENGTH, masked) / T
    assert total == pytest.approx(by_hand, abs=1e-9) and total > ENTROPY + 0.05


def test_independent_residues_have_their_entropy_at_every_level() -> None:
    f = swiss_prot(24)
    kernel = AbsorbingKernel(20, 24)
    used = torch.from_numpy(np.flatnonzero(f))
    x0 = used[:, None].expand(20, 20)
    share = torch.from_numpy(f).log().expand(20, 20, 24)
    lengths = torch.full((20,), 20)
    for t in (1, 6, 20):
        xt = torch.where(torch.arange(20) < t, 24, x0)
        steps = torch.full((20,), t)
        terms, counts = kernel.terms(share, x0, xt, steps, lengths), kernel.counts(steps, lengths)
        weights = torch.from_numpy(f)[used][:, None]
        assert float((weights * terms.ce).sum()) / float(counts.ce[0]) == pytest.approx(2.889, abs=5e-4)
        assert float((weights * terms.vb).sum()) / float(counts.vb[0]) == pytest.approx(2.889, abs=5e-4)


@pytest.mark.parametrize("T", [8, 20, 23])
def test_steps_share_the_residues_of_a_peptide(T: int) -> None:
    """The mean of T x share x masks over the timesteps is the number of residues, whatever the length."""
    kernel = AbsorbingKernel(T, 24)
    for length in range(1, 25):
        t = torch.arange(1, T + 1)
        x0 = torch.zeros(T, 24, dtype=torch.int64)
        lengths = torch.full((T,), length)
        xt = kernel.corrupt(x0, t, lengths, 0, "train", t)
        vb = kernel.terms(torch.zeros(T, 24, 24, dtype=torch.float64), x0, xt, t, lengths).vb.sum(-1)
        assert float(vb.mean()) == pytest.approx(length * math.log(24), rel=1e-9)
        if length <= T:
            assert vb.min() > 0


def test_the_weight_is_a_power_of_the_masked_share() -> None:
    t, lengths = torch.tensor([5, 10, 20]), torch.tensor([20, 8, 12])
    x0 = torch.zeros(3, 20, dtype=torch.int64)
    logits = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(0))
    plain, weighted = AbsorbingKernel(20, 24), AbsorbingKernel(20, 24, mask_weight=1.5)
    xt = plain.corrupt(x0, t, lengths, 0, "train", t)
    one, other = (kernel.terms(logits, x0, xt, t, lengths) for kernel in (plain, weighted))
    factor = torch.tensor([0.25, 0.5, 1.0]) ** 1.5
    torch.testing.assert_close(other.ce, one.ce * factor[:, None])
    assert torch.equal(other.vb, one.vb) and torch.equal(other.mask, one.mask)
    assert plain.counts(t, lengths).ce.tolist() == [5, 4, 12]
    torch.testing.assert_close(weighted.counts(t, lengths).ce, torch.tensor([5, 4, 12]).double() * factor.double())
    assert weighted.counts(t, lengths).vb.tolist() == [20, 8, 12]
    # A prediction that knows nothing costs ln 24 whatever the weights: the scale of the mean does not move.
    level = weighted.terms(torch.zeros_like(logits), x0, xt, t, lengths).ce.sum() / weighted.counts(t, lengths).ce.sum()
    assert float(level) == pytest.approx(math.log(24), rel=1e-6)


def test_the_reverse_step_masks_as_many_on_average_and_sums_to_one() -> None:
    kernel = AbsorbingKernel(20, 24)
    lengths, t, s = torch.tensor([20, 7, 1, 20]), torch.tensor([20, 13, 20, 4]), torch.tensor([19, 4, 0, 0])
    x0 = torch.randint(24, (4, 20), generator=torch.Generator().manual_seed(0)) * (torch.arange(20) < lengths[:, None])
    xt = kernel.corrupt(x0, t, lengths, 0, "train", t)
    logits = torch.randn(4, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = kernel.reverse(logits, xt, t, s, lengths)
    assert p.shape == (4, 20, 25)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 20, dtype=torch.float64))
    torch.testing.assert_close(p[..., 24].sum(-1), kernel.masked(s, lengths).double())
    known = xt != 24
    assert torch.equal(p[known].argmax(-1), xt[known]) and p[known].amax(-1).eq(1).all()
    hidden = p[~known][:, :24] / p[~known][:, :24].sum(-1, keepdim=True)
    torch.testing.assert_close(hidden, logits.softmax(-1)[~known])


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("T", [3, 7])
def test_samples_of_dependent_letters_have_their_distribution(order: Literal["random", "confidence"], T: int) -> None:
    kernel, rows = AbsorbingKernel(T, K), 3000
    draw, lengths = torch.arange(rows), torch.full((rows,), LENGTH)
    x = kernel.start(lengths, LENGTH, 0, "sample", draw)
    assert x.eq(MASK).all()
    for t in range(T, 0, -1):
        steps = torch.full_like(draw, t)
        x = kernel.step(exact_denoiser(x), x, steps, steps - 1, lengths, 0, "sample", draw, order)
        assert (x == MASK).sum(-1).eq(math.ceil((t - 1) * LENGTH / T)).all()
    counts = (x * torch.tensor([9, 3, 1])).sum(-1).bincount(minlength=27).double()
    assert ((counts - rows * SHARES) ** 2 / (rows * SHARES)).sum() < 54.1  # chi-square, 26 degrees of freedom, 0.1 %


def test_residues_drawn_together_lose_the_dependence() -> None:
    kernel, rows = AbsorbingKernel(3, K), 3000
    draw, lengths = torch.arange(rows), torch.full((rows,), LENGTH)
    x = kernel.start(lengths, LENGTH, 0, "sample", draw)
    x = kernel.step(exact_denoiser(x), x, draw * 0 + 3, draw * 0, lengths, 0, "sample", draw)
    counts = (x * torch.tensor([9, 3, 1])).sum(-1).bincount(minlength=27).double()
    assert ((counts - rows * SHARES) ** 2 / (rows * SHARES)).sum() > 200


def test_confidence_goes_first() -> None:
    kernel = AbsorbingKernel(4, 3)
    sharp = torch.tensor([[0.1, 3.0, 0.2, 9.0, 9.0]])
    logits = torch.stack([sharp, torch.zeros_like(sharp), torch.zeros_like(sharp)], -1)
    xt = torch.tensor([[3, 3, 3, 1, 0]])
    one = torch.tensor([4])
    x = kernel.step(logits, xt, one, one - 2, one, 0, "sample", one, "confidence")
    assert (x == 3).tolist() == [[True, False, True, False, False]] and x[0, 3] == 1 and x[0, 4] == 0
