"""The sampler with denoisers that are known exactly: what it draws has their distribution."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from pipeline.errors import UserError
from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.uniform import UniformKernel
from pipeline.systems.mimir.sampling import Denoise, draw_lengths, guided, sample

ROWS = 6_000
COMPOSITION = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
UNLIKELY = 1e-3
"""Least probability of a deviation as large as is seen; the seeds are fixed, and no other was tried."""


def independent(kernel: UniformKernel, frequencies: Tensor) -> Denoise:
    """log p(x_0 | x_t) of independent residues."""

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        kept = kernel.kept[t][:, None, None]
        same = torch.arange(kernel.K) == xt[..., None]
        return (frequencies * (kept * same + (1 - kept) / kernel.K)).log()

    return denoise


CHAINS = np.array(list(product(range(3), repeat=3)))
"""All peptides of three residues of three letters."""
SHARES = np.array([0.7 if a == b else 0.15 for a, b, _ in CHAINS]) * [0.8 if b == c else 0.1 for _, b, c in CHAINS] / 3
"""Of CHAINS: a residue is most often that before it."""


def chained(xt: Tensor, t: Tensor) -> Tensor:
    """log p(x_0 | visible residues) of CHAINS, by adding up all that agree with them."""
    chains, shares = torch.from_numpy(CHAINS), torch.from_numpy(SHARES)
    agree = ((xt[:, None] == 3) | (xt[:, None] == chains)).all(-1) * shares
    letters = torch.nn.functional.one_hot(chains, 3).double()
    return torch.einsum("rc,clk->rlk", agree, letters).clamp(min=1e-300).log()


def draws(count: int = ROWS) -> Tensor:
    return torch.arange(count)


def drawn(kernel: Kernel, denoise: Denoise, length: int, seed: int = 0, **options: Any) -> np.ndarray:
    lengths = torch.full((ROWS,), length)
    return sample(kernel, denoise, lengths, length, seed=seed, domain="test", draw=draws(), **options).numpy()


def is_likely(counts: np.ndarray, shares: np.ndarray) -> bool:
    return bool(chisquare(counts, shares / shares.sum() * counts.sum()).pvalue > UNLIKELY)


@pytest.mark.parametrize("steps", [None, 4, 1])
def test_independent_residues_are_drawn_as_often_as_they_are(steps: int | None) -> None:
    kernel = UniformKernel(10, 5)
    found = drawn(kernel, independent(kernel, COMPOSITION), 3, steps=steps)
    counts = np.bincount(found @ [25, 5, 1], minlength=125)
    shares = np.einsum("i,j,k->ijk", *[COMPOSITION.numpy()] * 3).ravel()
    assert is_likely(counts, shares)


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_residues_that_depend_on_each_other_are_drawn_so_one_at_a_time(order: str) -> None:
    kernel = AbsorbingKernel(5, 3)
    counts = np.bincount(drawn(kernel, chained, 3, order=order) @ [9, 3, 1], minlength=27)
    assert is_likely(counts, SHARES)
    # All at once they cannot be.
    counts = np.bincount(drawn(kernel, chained, 3, order=order, steps=1) @ [9, 3, 1], minlength=27)
    assert not is_likely(counts, SHARES)


@pytest.mark.parametrize(("guidance", "temperature"), [(1, 1), (0, 1), (2.5, 1), (0.5, 1), (1, 0.5), (1.5, 2)])
def test_guidance_and_temperature_change_the_distribution_as_they_say(guidance: float, temperature: float) -> None:
    conditional, unconditional = COMPOSITION, COMPOSITION.flip(0)
    wanted = (conditional**guidance * unconditional ** (1 - guidance)) ** (1 / temperature)

    def constant(frequencies: Tensor) -> Denoise:
        return lambda xt, t: frequencies.log().expand(*xt.shape, 5) + 3.0

    denoise = guided(constant(conditional), constant(unconditional), guidance)
    found = drawn(AbsorbingKernel(2, 5), denoise, 1, temperature=temperature)
    assert is_likely(np.bincount(found[:, 0], minlength=5), wanted.numpy())


def test_guidance_1_asks_the_conditional_denoiser_alone_and_0_the_other() -> None:
    def never(xt: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked for what does not count")

    logits = torch.randn(2, 3, 5)
    xt, t = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    assert torch.equal(guided(lambda xt, t: logits, never)(xt, t), logits)
    assert torch.equal(guided(never, lambda xt, t: logits, guidance=0)(xt, t), logits)


@pytest.mark.parametrize("kernel", [UniformKernel(10, 5), AbsorbingKernel(10, 5)])
def test_temperature_0_gives_the_likeliest_letter(kernel: Kernel) -> None:
    logits = COMPOSITION.log()[[3, 1, 0, 4, 2]]
    assert (drawn(kernel, lambda xt, t: logits.expand(*xt.shape, 5), 4, temperature=0) == 2).all()


@pytest.mark.parametrize("kernel", [UniformKernel(10, 5), AbsorbingKernel(10, 5)])
@pytest.mark.parametrize(
    "dtype, temperature",
    [*((torch.float64, low) for low in (5e-324, 1e-310, 1e-300)),
     *((torch.float32, low) for low in (1e-60, 1e-39, 1e-38, 2e-38, 1e-6))],
)  # fmt: skip
def test_a_temperature_near_0_is_that_of_0(kernel: Kernel, dtype: torch.dtype, temperature: float) -> None:
    """Divided by it, logits overflow."""
    logits = 30 * COMPOSITION.log()[[3, 1, 0, 4, 2]].to(dtype)
    lengths = torch.full((50,), 4)
    found = sample(kernel, lambda xt, t: logits.expand(*xt.shape, 5), lengths, 4, seed=0, domain="test", draw=draws(50),
                   temperature=temperature)  # fmt: skip
    assert (found == 2).all()


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 3.0])
def test_the_surest_residues_are_revealed_first_at_every_temperature(temperature: float) -> None:
    """At 0 each residue has a letter of probability 1, and other temperatures change which residue is the surest."""
    place = torch.tensor([[2, 0, 3, 1]])  # of the residues, the surest first
    shares = torch.tensor([[0.4, 0.15, 0.15, 0.15, 0.15], [0.3, 0.29, 0.29, 0.06, 0.06], [0.9, 0.1, 0, 0, 0],
                           [0.35, 0.33, 0.3, 0.01, 0.01]], dtype=torch.float64)  # fmt: skip
    visible = []

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        visible.append((xt != 5)[0].tolist())
        return shares.clamp(min=1e-9).log().expand(len(xt), 4, 5)

    drawn(AbsorbingKernel(4, 5), denoise, 4, temperature=temperature)
    assert [sum(row) for row in visible] == [0, 1, 2, 3]
    for row, number in zip(visible, range(4), strict=True):
        assert {spot for spot in range(4) if row[spot]} == set(place[0, :number].tolist())


@pytest.mark.parametrize("kernel", [UniformKernel(10, 3), AbsorbingKernel(10, 3)])
def test_a_peptide_depends_on_its_seed_and_number_alone(kernel: Kernel) -> None:
    lengths = 1 + draws(300) % 3

    def some(rows: slice, seed: int) -> Tensor:
        denoise = independent(kernel, COMPOSITION[:3]) if isinstance(kernel, UniformKernel) else chained
        return sample(kernel, denoise, lengths[rows], 3, seed=seed, domain="test", draw=draws(300)[rows])

    whole = some(slice(None), 1)
    parts = [some(slice(start, start + 7), 1) for start in range(0, 300, 7)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, some(slice(None), 2))
    inside = torch.arange(3) < lengths[:, None]
    assert (whole[~inside] == 0).all() and (whole >= 0).all() and (whole < 3).all()


def test_lengths_are_drawn_as_often_as_they_are_within_the_range() -> None:
    shares = torch.tensor([0, 0.1, 0.2, 0.3, 0.15, 0.25])
    found = draw_lengths(shares.log().expand(ROWS, 6), 2, 4, seed=0, domain="test", draw=draws())
    counts = np.bincount(found.numpy(), minlength=6)
    assert counts[[0, 1, 5]].sum() == 0 and is_likely(counts[2:5], shares[2:5].double().numpy())
    again = draw_lengths(shares.log().expand(9, 6), 2, 4, seed=0, domain="test", draw=torch.arange(5, 14))
    assert torch.equal(again, found[5:14])
    with pytest.raises(UserError, match="--min-length 7 --max-length 9: the model has seen no peptide"):
        draw_lengths(shares.log().expand(9, 6), 7, 9, seed=0, domain="test", draw=draws(9))


def test_a_diverged_model_is_refused() -> None:
    lengths = torch.ones(2, dtype=torch.int64)
    for wrong in (torch.nan, torch.inf):
        log_lengths = torch.zeros(2, 6)
        log_lengths[1, 3] = wrong
        with pytest.raises(UserError, match="the model's lengths are not finite: its weights have diverged"):
            draw_lengths(log_lengths, 2, 4, seed=0, domain="test", draw=draws(2))
    with pytest.raises(UserError, match="diverged: give an earlier checkpoint"):
        sample(
            UniformKernel(2, 3), lambda xt, t: torch.full((2, 1, 3), torch.nan), lengths, 1, seed=0, domain="test",
            draw=draws(2),
        )  # fmt: skip
