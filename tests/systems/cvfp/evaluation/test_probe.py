"""The linear probe, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.evaluation import probe
from pipeline.systems.cvfp.evaluation.probe import Examples, classes_of, fit_and_score

ALONE = Topology()


def features(ids: torch.Tensor, back: int, width: int = 24) -> torch.Tensor:
    """A random vector of the token so many places back [rows, L, width], with an offset."""
    table = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    return table[ids.roll(back, 1)] + 5


def tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    shares = torch.arange(1.0, 13.0).expand(rows, 12)
    return torch.multinomial(shares, length, replacement=True, generator=torch.Generator().manual_seed(seed))


def probed(back: int, noise: float = 0.0) -> probe.ProbeResult:
    sides = []
    for seed, rows in ((0, 40), (1, 20), (2, 20)):
        ids = tokens(rows, 30, seed)
        mask = torch.arange(30) < torch.arange(11, 11 + rows)[:, None]
        found = features(ids, back)
        found = found + noise * torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
        sides.append(Examples.of([found], [ids], [mask]))
    return fit_and_score(sides[0], sides[1], sides[2], classes_of(tokens(40, 30, 0).numpy().ravel()), ALONE)


def test_it_reads_all_where_the_token_is_in_the_features_and_nothing_where_it_is_not() -> None:
    there, elsewhere = probed(back=2), probed(back=0)
    assert there.accuracy == 1
    # The most frequent of twelve tokens has 12 / 78 of all.
    assert there.most_frequent == pytest.approx(12 / 78, abs=0.05)
    assert elsewhere.accuracy == pytest.approx(elsewhere.most_frequent, abs=0.05)
    assert there.count == elsewhere.count == sum(min(30, length) - 2 for length in range(11, 31))
    assert there.accuracy > probed(back=2, noise=3.0).accuracy > elsewhere.accuracy + 0.05


def test_the_weights_are_those_of_ridge_regression() -> None:
    """The answers of a solve of the normal equations with an intercept, for the penalty that was chosen."""
    ids, mask = tokens(30, 20, 0), torch.ones(30, 20, dtype=torch.bool)
    noisy = features(ids, 2, 6) + torch.randn(30, 20, 6, generator=torch.Generator().manual_seed(3))
    examples, classes = Examples.of([noisy], [ids], [mask]), classes_of(ids.numpy().ravel())
    found = fit_and_score(examples, examples, examples, classes, ALONE)
    x, y = examples.features.double().numpy(), (examples.labels[:, None] == classes).double().numpy()
    centred, target = x - x.mean(0), y - y.mean(0)
    covariance = centred.T @ centred / len(x)
    penalty = found.ridge * np.trace(covariance) / 6
    weights = np.linalg.solve(covariance + penalty * np.eye(6), centred.T @ target / len(x))
    answers = classes[(centred @ weights + y.mean(0)).argmax(-1)]
    assert found.accuracy == pytest.approx(float((answers == examples.labels).double().mean()), abs=2e-3)


def test_the_penalty_is_that_which_reads_most_of_what_was_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    # Fewer tokens than features: without a penalty noise is fitted.
    table = torch.randn(12, 40, generator=generator)
    sides = [torch.randint(12, (count,), generator=generator) for count in (41, 400, 400)]
    examples = [Examples(table[one] + 2 * torch.randn(len(one), 40, generator=generator), one) for one in sides]
    fitting, tuning, held_out = examples
    best = fit_and_score(fitting, tuning, held_out, torch.arange(12), ALONE)
    shares = {}
    for ridge in probe.RIDGES:
        monkeypatch.setattr(probe, "RIDGES", (ridge,))
        shares[ridge] = fit_and_score(fitting, tuning, tuning, torch.arange(12), ALONE).accuracy
    assert shares[best.ridge] == max(shares.values()) and best.ridge > 1e-6


def test_tokens_that_are_no_class_count_as_misread() -> None:
    ids = tokens(40, 30, 0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    examples = Examples.of([features(ids, 2)], [ids], [mask])
    classes = classes_of(ids.numpy().ravel(), most=4)
    assert len(classes) == 4 and sorted(classes.tolist()) == [8, 9, 10, 11]
    found = fit_and_score(examples, examples, examples, classes, ALONE)
    assert found.accuracy <= float(torch.isin(examples.labels, classes).double().mean()) < 1


def test_rows_of_two_tokens_have_no_example() -> None:
    ids, mask = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    assert len(Examples.of([torch.zeros(2, 2, 3)], [ids], [mask]).labels) == 0
    one = Examples.of([torch.zeros(2, 1, 3)], [ids[:, :1]], [mask[:, :1]])
    assert one.features.shape == (0, 3) and one.labels.shape == (0,)
