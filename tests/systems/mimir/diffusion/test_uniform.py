"""Uniform noise: the closed forms against products of matrices, and the reverse step that keeps a distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.systems.mimir.diffusion.uniform import UniformKernel
from tests.systems.mimir.diffusion import reference

ALPHABET = 25
LENGTHS = (1, 2, 10, 37)


def pairs(K: int) -> tuple[Tensor, Tensor]:
    """Every x_0 with every x_t: a row each, of one residue."""
    x0, xt = torch.cartesian_prod(torch.arange(K), torch.arange(K)).unbind(-1)
    return x0[:, None], xt[:, None]


def logits_of(K: int, seed: int, size: float = 2.0) -> Tensor:
    """A prediction for each x_t, [K, K] float64."""
    return size * torch.randn(K, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(like: Tensor, value: int = 1) -> Tensor:
    return torch.full((len(like),), value)


@settings(max_examples=25, deadline=None)
@given(K=st.integers(2, 9), T=st.sampled_from(LENGTHS), seed=st.integers(0, 99), data=st.data())
def test_a_step_of_any_size_is_the_mean_posterior(K: int, T: int, seed: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, T))
    s = data.draw(st.integers(0, t - 1))
    prediction = logits_of(K, seed)
    xt = torch.arange(K)[:, None]
    result = UniformKernel(T, K).reverse(prediction[:, None], xt, ones(xt, t), ones(xt, s), ones(xt))[:, 0]
    expected = reference.mixture(prediction.softmax(-1).numpy(), T, s, t)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-13)
    np.testing.assert_allclose(result.sum(-1).numpy(), 1, atol=1e-13)
    np.testing.assert_allclose(reference.posterior(T, K, s, t).sum(-1), 1, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(K=st.integers(2, 9), T=st.sampled_from(LENGTHS), seed=st.integers(0, 99), data=st.data())
def test_the_divergence_is_that_of_the_matrices(K: int, T: int, seed: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, T))
    prediction = logits_of(K, seed)
    x0, xt = pairs(K)
    terms = UniformKernel(T, K).terms(prediction[xt], x0, xt, ones(x0, t), ones(x0))
    p = prediction.softmax(-1).numpy()
    q = reference.posterior(T, K, t - 1, t)
    expected = T * reference.divergence(q, reference.mixture(p, T, t - 1, t)[None])
    np.testing.assert_allclose(terms.vb.numpy().reshape(K, K), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(terms.ce.numpy().reshape(K, K), -np.log(p).T, rtol=1e-12)
    assert terms.mask.all()


@pytest.mark.parametrize("T, joint", [(10, 4.37), (25, 4.60), (35, 4.65)])
def test_the_exact_prediction_has_the_entropy_as_its_bound(T: int, joint: float) -> None:
    f = reference.swiss_prot(ALPHABET)
    used = np.flatnonzero(f)
    entropy = float(-(f[used] * np.log(f[used])).sum())
    assert entropy == pytest.approx(2.889, abs=5e-4)
    kernel = UniformKernel(T, ALPHABET)
    x0, xt = pairs(ALPHABET)
    possible = torch.from_numpy(f > 0)[x0[:, 0]]
    x0, xt = x0[possible], xt[possible]
    total = float(kernel.prior_bound(x0[:1], ones(x0[:1])))
    for t in range(1, T + 1):
        exact = torch.from_numpy(reference.exact_prediction(f, T, t)).log()
        vb = kernel.terms(exact[xt], x0, xt, ones(x0, t), ones(x0)).vb
        weights = torch.from_numpy(f[:, None] * reference.between(T, ALPHABET, 0, t))[x0, xt]
        total += float((weights * vb).sum()) / T
    assert total == pytest.approx(entropy, abs=1e-6)
    assert reference.bound(f, T, reference.mixture) == pytest.approx(entropy, abs=1e-6)
    wrong = reference.bound(f, T, reference.joint_form)
    assert wrong == pytest.approx(joint, abs=5e-3) and wrong > entropy + 1.4


@pytest.mark.parametrize("T, joint", [(10, 0.087), (25, 0.092), (35, 0.093)])
@pytest.mark.parametrize("steps", [1, 3, 99])
def test_the_exact_prediction_gives_the_distribution_back_however_many_steps(T: int, joint: float, steps: int) -> None:
    f = reference.swiss_prot(ALPHABET)
    kernel = UniformKernel(T, ALPHABET)
    ladder = kernel.ladder(steps)
    xt = torch.arange(ALPHABET)[:, None]
    share = np.full(ALPHABET, 1 / ALPHABET)
    for t, s in itertools.pairwise(ladder):
        exact = torch.from_numpy(reference.exact_prediction(f, T, t)).log()
        share = share @ kernel.reverse(exact[:, None], xt, ones(xt, t), ones(xt, s), ones(xt))[:, 0].numpy()
    # What is left is that the process starts from uniform letters, of which x_T has kept a little more than nothing.
    assert np.abs(share - f).sum() / 2 < 2e-4
    assert np.abs(reference.chain(f, T, reference.joint_form) - f).sum() / 2 == pytest.approx(joint, abs=5e-4)


@pytest.mark.parametrize("steps", [2, 10])
def test_samples_have_the_distribution(steps: int) -> None:
    T, rows, width = 10, 300, 20
    f = reference.swiss_prot(ALPHABET)
    kernel = UniformKernel(T, ALPHABET)
    draw, lengths = torch.arange(rows), torch.full((rows,), width)
    x = kernel.start(lengths, width, 0, "sample", draw)
    ladder = kernel.ladder(steps)
    for t, s in itertools.pairwise(ladder):
        exact = torch.from_numpy(reference.exact_prediction(f, T, t)).log()
        x = kernel.step(exact[x], x, ones(x, t), ones(x, s), lengths, 0, "sample", draw)
    counts = x.flatten().bincount(minlength=ALPHABET).numpy()
    assert counts[f == 0].sum() == 0
    expected = f[f > 0] * rows * width
    assert ((counts[f > 0] - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    again = kernel.start(lengths, width, 1, "sample", draw)
    assert not torch.equal(again, kernel.start(lengths, width, 0, "sample", draw))


@pytest.mark.parametrize("t", [0, 1, 5, 10])
def test_corrupted_letters_have_the_rows_of_the_matrix(t: int) -> None:
    K, T, rows = 4, 10, 20_000
    x0 = torch.full((rows, 2), 2)
    xt = UniformKernel(T, K).corrupt(x0, ones(x0, t), ones(x0), 0, "train", torch.arange(rows))
    share = xt[:, 0].bincount(minlength=K).numpy() / rows
    assert np.abs(share - reference.between(T, K, 0, t)[2]).max() < 4 * 0.5 / rows**0.5
    assert xt[:, 1].eq(0).all()


def test_timesteps_of_a_draw_have_noise_of_their_own() -> None:
    kernel = UniformKernel(10, 24)
    draw = torch.zeros(10, dtype=torch.int64)
    x0, lengths = torch.zeros(10, 200, dtype=torch.int64), torch.full((10,), 200)
    xt = kernel.corrupt(x0, torch.full((10,), 10), lengths, 0, "train", draw)
    assert torch.equal(xt[0], xt[1])
    xt = kernel.corrupt(x0, torch.tensor([9, 10] * 5), lengths, 0, "train", draw)
    assert 0.01 < float((xt[0] == xt[1]).double().mean()) < 0.15


@pytest.mark.parametrize("K, T", [(2, 1), (24, 10), (24, 1000)])
def test_the_prior_term_is_the_divergence_from_uniform_letters(K: int, T: int) -> None:
    row = reference.between(T, K, 0, T)[0]
    prior = UniformKernel(T, K).prior_bound(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([2, 0]))
    assert float(prior[0, 0]) == pytest.approx(float(reference.divergence(row, np.full(K, 1 / K))), rel=1e-4)
    assert prior[0, 2] == 0 and prior[1].eq(0).all() and prior[0, 0] == prior[0, 1]


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_single_precision_is_close_to_double(T: int) -> None:
    kernel = UniformKernel(T, 24)
    rows = 400
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(24, (rows, 5), generator=generator)
    t = torch.randint(1, T + 1, (rows,), generator=generator)
    xt = kernel.corrupt(x0, t, torch.full((rows,), 5), 0, "train", torch.arange(rows))
    prediction = 4 * torch.randn(rows, 5, 24, generator=generator)
    single = kernel.terms(prediction, x0, xt, t, torch.full((rows,), 5))
    double = kernel.terms(prediction.double(), x0, xt, t, torch.full((rows,), 5))
    torch.testing.assert_close(single.vb.double(), double.vb, rtol=2e-5, atol=3e-6 * T)
    torch.testing.assert_close(single.ce.double(), double.ce, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("T", [1, 10, 1000])
@pytest.mark.parametrize("size", [30.0, 3e4])
def test_certain_predictions_have_finite_losses_and_gradients(T: int, size: float) -> None:
    kernel = UniformKernel(T, 6)
    x0, xt = pairs(6)
    for t in {1, min(2, T), T}:
        prediction = torch.nn.functional.one_hot(torch.arange(6).roll(1), 6).float()[xt].mul(size).requires_grad_()
        terms = kernel.terms(prediction, x0, xt, ones(x0, t), ones(x0))
        assert terms.vb.isfinite().all() and terms.ce.isfinite().all()
        (terms.vb.sum() + terms.ce.sum()).backward()
        assert prediction.grad is not None and prediction.grad.isfinite().all()
        probabilities = kernel.reverse(prediction.detach(), xt, ones(x0, t), ones(x0, t - 1), ones(x0))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(36, 1), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_divergence() -> None:
    """Against autograd through the posteriors written out."""
    T, K, t = 10, 4, 6
    x0, xt = pairs(K)
    prediction = logits_of(K, 0)[xt].requires_grad_()
    vb = UniformKernel(T, K).terms(prediction, x0, xt, ones(x0, t), ones(x0)).vb
    (gradient,) = torch.autograd.grad(vb.square().sum(), prediction)
    q = torch.from_numpy(reference.posterior(T, K, t - 1, t))
    p = torch.einsum("na,naj->nj", prediction[:, 0].softmax(-1), q[:, xt[:, 0]].transpose(0, 1))
    true = q[x0[:, 0], xt[:, 0]]
    written_out = T * (true * (true / p).log()).sum(-1)
    (expected,) = torch.autograd.grad(written_out.square().sum(), prediction)
    torch.testing.assert_close(vb[:, 0], written_out)
    torch.testing.assert_close(gradient, expected)
