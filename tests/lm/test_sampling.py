"""What is drawn: against transformers' own filters, and against the probabilities themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.errors import UserError
from pipeline.lm.sampling import Sampling


def logits_of(seed: int, count: int = 40) -> torch.Tensor:
    return 3 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of every token."""
    tokens, probabilities = sampling.distribution(logits)
    return torch.zeros(len(logits), dtype=torch.float64).index_add_(0, tokens, probabilities)


@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
)
def test_the_distribution_is_that_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = logits_of(seed)
    filters: list[Any] = [TemperatureLogitsWarper(temperature)]
    filters += [TopKLogitsWarper(top_k)] if top_k else []
    filters += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted = LogitsProcessorList(filters)(torch.zeros(1, 0), logits.unsqueeze(0))[0].softmax(dim=0)
    found = dense(Sampling(temperature, top_k, top_p), logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_of_equally_likely_tokens_the_lower_ones_stay() -> None:
    assert dense(Sampling(top_k=2), torch.zeros(4)).tolist() == [0.5, 0.5, 0, 0]
    assert dense(Sampling(top_p=0.5), torch.zeros(4)).tolist() == [0.5, 0.5, 0, 0]
    assert dense(Sampling(top_p=1e-9), torch.zeros(4)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=9), Sampling(1.3, top_p=0.8)])
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    logits, count = logits_of(3, 8) / 3, 4_000
    drawn = torch.tensor(sampling.choose(logits.expand(count, -1), range(count), [5] * count))
    wanted = count * dense(sampling, logits)
    counts = torch.bincount(drawn, minlength=8)
    assert counts[wanted == 0].sum() == 0
    terms = (counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]
    # Chi-squared with 7 degrees of freedom at the most: beyond 24 in one of 1,000 cases, and the draws are always the
    # same.
    assert float(terms.sum()) < 24


def test_noise_is_exponential_and_depends_on_seed_text_and_position() -> None:
    noise = torch.stack([Sampling(seed=1).noise(text, place, 50) for text in range(10) for place in range(20)])
    assert noise.dtype == torch.float64 and noise.min() >= 0 and len(noise.unique()) == noise.numel()
    # exp(-x) of exponential numbers is uniform; 19 degrees of freedom, beyond 50 in one of 7,000 cases.
    counts = torch.histc((-noise).exp(), bins=20, min=0, max=1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 50
    assert torch.corrcoef(noise[:, :4].T).fill_diagonal_(0).abs().max() < 0.25
    assert torch.equal(Sampling(seed=1).noise(2, 3, 9), noise[2 * 20 + 3, :9])
    firsts = {float(Sampling(seed=seed).noise(text, 5, 1)) for seed in (0, 1, -1) for text in (0, 1)}
    assert len(firsts) == 6


@given(st.integers(0, 1000), st.integers(0, 30))
def test_tokens_that_are_hardly_possible_change_no_draw(seed: int, padding: int) -> None:
    """A vocabulary that is padded to another size draws the same."""
    logits = logits_of(seed)
    padded = torch.cat([logits, torch.full((padding,), -60.0, dtype=torch.float64)])
    for sampling in (Sampling(2.0, seed=seed), Sampling(2.0, top_p=0.9, seed=seed)):
        assert sampling.choose(padded.unsqueeze(0), [1], [7]) == sampling.choose(logits.unsqueeze(0), [1], [7])


@given(st.data())
def test_a_row_is_drawn_alike_whatever_is_beside_it(data: st.DataObject) -> None:
    sampling = Sampling(1.5, top_p=0.95, seed=data.draw(st.integers(0, 100)))
    logits = torch.stack([logits_of(row) for row in range(5)])
    positions = [3, 1, 4, 1, 5]
    together = sampling.choose(logits, range(5), positions)
    rows = data.draw(st.permutations(range(5)))[: data.draw(st.integers(1, 5))]
    alone = sampling.choose(logits[rows], rows, [positions[row] for row in rows])
    assert alone == [together[row] for row in rows]


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = torch.stack([logits_of(row) for row in range(5)])
    assert Sampling(0).choose(logits, range(5), [0] * 5) == logits.argmax(dim=1).tolist()
    assert Sampling(1e-320).choose(logits, range(5), [0] * 5) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_of_a_diverged_model_are_refused(value: float) -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = value
    with pytest.raises(UserError, match="not finite"):
        Sampling().choose(logits, [0], [0])


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_p": float("nan")}, "--top-p nan"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        Sampling(**options)
