"""Perplexities beside those without context."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.systems.cvfp.evaluation.control import ABLATED, CONTROL, LABELS, MODEL, UNIGRAM, compared


def sums(documents: int = 200) -> dict[str, torch.Tensor]:
    """A control that costs 0.2 nats a label more, in documents of very different difficulty."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, 100, (documents,), generator=generator).double()
    difficulty = 3 + 2 * torch.rand(documents, generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(documents, generator=generator, dtype=torch.float64)
    return {
        LABELS: labels, MODEL: labels * difficulty, CONTROL: labels * (difficulty + 0.2 + noise),
        UNIGRAM: labels * (difficulty + 1), ABLATED: labels * (difficulty + 0.1),
    }  # fmt: skip


def test_a_ratio_is_of_the_same_documents() -> None:
    found, data = compared(sums()), sums()
    scalars = found.scalars
    whole = {name: float(value.sum()) for name, value in data.items()}
    assert scalars["prediction/ppl_model"] == pytest.approx(math.exp(whole[MODEL] / whole[LABELS]))
    assert scalars["prediction/ratio_control"] == pytest.approx(
        math.exp((whole[CONTROL] - whole[MODEL]) / whole[LABELS])
    )
    assert scalars["prediction/ratio_control"] == pytest.approx(
        scalars["prediction/ppl_control"] / scalars["prediction/ppl_model"]
    )
    assert scalars["prediction/ratio_unigram"] == pytest.approx(math.e)
    low, high = scalars["prediction/ratio_control_low"], scalars["prediction/ratio_control_high"]
    assert 1.1 < low < scalars["prediction/ratio_control"] < high < 1.3
    # Of the perplexities themselves nothing so narrow can be said: documents are of different difficulty.
    assert high - low < 0.05
    curve = found.curves["prediction"]
    lows, highs = curve.intervals["perplexity"]
    assert len(curve.names) == 4 and highs[0] - lows[0] > 5 and lows[0] < curve.series["perplexity"][0] < highs[0]
    assert scalars["prediction/documents"] == 200


def test_documents_without_a_label_count_for_nothing() -> None:
    data = sums(20)
    more = {name: torch.cat([value, torch.zeros(3, dtype=torch.float64)]) for name, value in data.items()}
    assert compared(more).scalars == compared(data).scalars


def test_what_is_not_there_is_not_compared() -> None:
    data = {name: value for name, value in sums().items() if name in (MODEL, LABELS)}
    found = compared(data)
    assert {name for name in found.scalars if "ratio" in name} == set() and len(found.curves["prediction"].names) == 1
    one = compared({name: value[:1] for name, value in sums().items()})
    assert math.isnan(one.scalars["prediction/ratio_control_low"]) and one.scalars["prediction/ratio_control"] > 1
