"""The linear probe, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.evaluation import probe as module
from pipeline.systems.cvfp.evaluation.probe import RIDGES, TUNING, Probe, ProbeResult, Readout, classes_of, examples

ALONE = Topology()
CPU = torch.device("cpu")
Rows = tuple[Tensor, Tensor, Tensor]
"""Features [rows, L, D], ids and mask [rows, L]."""


def features(ids: Tensor, back: int, width: int = 24) -> Tensor:
    """A random vector of the token so many places back [rows, L, width], with an offset."""
    table = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    return table[ids.roll(back, 1)] + 5


def tokens(rows: int, length: int, seed: int) -> Tensor:
    shares = torch.arange(1.0, 13.0).expand(rows, 12)
    return torch.multinomial(shares, length, replacement=True, generator=torch.Generator().manual_seed(seed))


def side(seed: int, rows: int, back: int, noise: float = 0.0, *, length: int = 30, width: int = 24) -> Rows:
    """Rows of different lengths."""
    ids = tokens(rows, length, seed)
    found = features(ids, back, width)
    found = found + noise * torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    return found, ids, torch.arange(length) < torch.arange(11, 11 + rows)[:, None]


def fitted(training: Rows, classes: Tensor, piece: int = 7) -> Readout:
    """In pieces of so many rows."""
    given, ids, mask = training
    probe = Probe(given.shape[-1], classes, CPU)
    for rows in torch.arange(len(ids)).split(piece):
        probe.add(given[rows], ids[rows], mask[rows], rows)
    return probe.fit(ALONE)


def scored(readout: Readout, held_out: Rows) -> ProbeResult:
    given, ids, mask = held_out
    for rows in torch.arange(len(ids)).split(9):
        readout.score(given[rows], ids[rows], mask[rows])
    return readout.result(ALONE)


def probed(back: int, noise: float = 0.0) -> ProbeResult:
    training, held_out = side(0, 50, back, noise), side(2, 20, back, noise)
    return scored(fitted(training, classes_of(training[1].numpy().ravel())), held_out)


def test_it_reads_all_where_the_token_is_in_the_features_and_nothing_where_it_is_not() -> None:
    there, elsewhere = probed(back=2), probed(back=0)
    assert there.accuracy == 1
    # The most frequent of twelve tokens has 12 / 78 of all.
    assert there.most_frequent == pytest.approx(12 / 78, abs=0.05)
    assert elsewhere.accuracy == pytest.approx(elsewhere.most_frequent, abs=0.05)
    assert there.count == elsewhere.count == sum(min(30, length) - 2 for length in range(11, 31))
    assert there.accuracy > probed(back=2, noise=3.0).accuracy > elsewhere.accuracy + 0.05


def reference(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of features [N, D] with an intercept, as least squares of a longer matrix."""
    centred, target = x - x.mean(0), y - y.mean(0)
    penalty = ridge * np.square(centred).mean() * len(x)
    longer = np.concatenate([centred, np.sqrt(penalty) * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(longer, np.concatenate([target, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return weights, y.mean(0) - x.mean(0) @ weights


def one_hot(rows: Rows, classes: Tensor, chosen: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x, labels = examples(*(one[chosen] for one in rows))
    return x.double().numpy(), (labels[:, None] == classes).double().numpy()


@settings(max_examples=12, deadline=None)
@given(st.integers(6, 40), st.sampled_from([0.5, 4.0]), st.integers(1, 11), st.integers(3, 12))
def test_the_weights_are_those_of_ridge_regression_of_all_rows(rows: int, noise: float, piece: int, most: int) -> None:
    """The penalty is that with the least squared error on every fifth row, of the others' weights."""
    training = side(0, rows, 2, noise, length=20, width=6)
    classes = classes_of(training[1].numpy().ravel(), most)
    found = fitted(training, classes, piece)
    tuned = torch.arange(rows) % TUNING == TUNING - 1
    (x, y), (others, wanted) = one_hot(training, classes, ~tuned), one_hot(training, classes, tuned)
    errors = []
    for ridge in RIDGES:
        weights, bias = reference(x, y, ridge)
        errors.append(np.square(others @ weights + bias - wanted).sum())
    assert errors[RIDGES.index(found.ridge)] == pytest.approx(min(errors), rel=1e-9)
    weights, bias = reference(*one_hot(training, classes, torch.ones(rows, dtype=torch.bool)), found.ridge)
    assert found.weights.numpy() == pytest.approx(weights, rel=1e-6, abs=1e-9)
    assert found.bias.numpy() == pytest.approx(bias, rel=1e-6, abs=1e-9)


def test_answers_are_those_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_out = side(0, 30, 2, 3.0), side(2, 20, 2, 3.0)
    classes = classes_of(training[1].numpy().ravel())
    readout = fitted(training, classes)
    x, y = one_hot(held_out, classes, torch.ones(20, dtype=torch.bool))
    answers = (x @ readout.weights.numpy() + readout.bias.numpy()).argmax(-1)
    whole = scored(readout, held_out)
    assert whole.accuracy == float(y[range(len(y)), answers].mean()) and 0.2 < whole.accuracy < 1
    # Few tokens at a time.
    monkeypatch.setattr(module, "BLOCK", 5)
    assert scored(fitted(training, classes), held_out) == whole


def test_more_rows_take_no_more_memory() -> None:
    """What a probe holds is decided by the width and the number of classes."""
    held = []
    for rows in (5, 500):
        training = side(0, rows, 2, length=12)
        probe = Probe(24, torch.arange(12), CPU)
        probe.add(*training, torch.arange(rows))
        equations = (probe._fitting, probe._tuning)
        held.append(sum(tensor.numel() for one in equations for tensor in one.tensors))
    assert held[0] == held[1] == 2 * (1 + 24 + 24**2 + 12 + 12 * 24)


def test_where_noise_would_be_fitted_a_larger_penalty_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    # About as many tokens as features.
    table = torch.randn(12, 40, generator=generator)
    ids = torch.randint(12, (14, 6), generator=generator)
    noisy = table[ids.roll(2, 1)] + 2 * torch.randn(14, 6, 40, generator=generator)
    readout = fitted((noisy, ids, torch.ones_like(ids, dtype=torch.bool)), torch.arange(12))
    assert readout.ridge >= 1e-2


def test_tokens_that_are_no_class_count_as_misread() -> None:
    ids = tokens(40, 30, 0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = features(ids, 2), ids, mask
    classes = classes_of(ids.numpy().ravel(), most=4)
    assert len(classes) == 4 and sorted(classes.tolist()) == [8, 9, 10, 11]
    found = scored(fitted(rows, classes), rows)
    assert found.accuracy <= float(torch.isin(examples(*rows)[1], classes).double().mean()) < 1


def test_rows_of_two_tokens_have_no_example() -> None:
    ids, mask = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    assert len(examples(torch.zeros(2, 2, 3), ids, mask)[1]) == 0
    given, labels = examples(torch.zeros(2, 1, 3), ids[:, :1], mask[:, :1])
    assert given.shape == (0, 3) and labels.shape == (0,)
