"""The linear probe, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.evaluation import probe as module
from pipeline.systems.cvfp.evaluation.probe import Probe, ProbeResult, Readout, classes_of, examples

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


def fitted_by_lbfgs(training: Rows, classes: Tensor) -> Readout:
    """The minimum of the same loss, of all examples at once, float64."""
    x, labels = examples(*training)
    x, answers = x.double(), (labels[:, None] == classes).int().argmax(-1)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    whiten = vectors / (values + module.FLOOR * values.mean()).sqrt()
    white = (x - mean) @ whiten
    weights = torch.zeros(x.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(white @ weights + bias, answers) + module.PENALTY / 2 * weights.square().sum()
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    linear = whiten @ weights.detach()
    return Readout(linear, bias.detach() - mean @ linear, classes)


def nats(readout: Readout, rows: Rows) -> float:
    x, labels = examples(*rows)
    answers = (labels[:, None] == readout.classes).int().argmax(-1)
    return float(F.cross_entropy(x.double() @ readout.weights + readout.bias, answers))


def test_it_is_logistic_regression() -> None:
    """Near the minimum of its loss, on what it is fitted to and held out."""
    training, held_out = side(0, 200, 2, 3.0), side(2, 60, 2, 3.0)
    classes = classes_of(training[1].numpy().ravel())
    found, expected = fitted(training, classes), fitted_by_lbfgs(training, classes)
    assert nats(expected, training) < 2.2, "the loss of the shares of the classes is 2.27"
    for rows in (training, held_out):
        assert nats(found, rows) == pytest.approx(nats(expected, rows), rel=0.03)
        assert scored(found, rows).accuracy == pytest.approx(scored(expected, rows).accuracy, abs=0.01)


def test_a_gradient_is_that_of_the_mean_cross_entropy() -> None:
    training = side(0, 9, 2, 1.0)
    classes = classes_of(training[1].numpy().ravel())
    probe = Probe(24, classes, CPU)
    probe.add(*training, torch.arange(9))
    numbers = [1, 4, 8, 77]
    weights = torch.randn(25, len(classes), generator=torch.Generator().manual_seed(0), requires_grad=True)
    x, labels = examples(*(one[numbers[:-1]] for one in training))
    logits = x @ weights[:-1] + weights[-1]
    F.cross_entropy(logits, (labels[:, None] == classes).int().argmax(-1)).backward()
    found = probe._gradient(weights.detach(), numbers, ALONE)
    torch.testing.assert_close(found, weights.grad)


def test_scale_and_place_of_features_say_nothing() -> None:
    """Nor does the size of the pieces in which they come, or which rank has a row."""
    training, held_out = side(0, 60, 2, 3.0), side(2, 20, 2, 3.0)
    classes = classes_of(training[1].numpy().ravel())
    expected = scored(fitted(training, classes), held_out)
    assert scored(fitted(training, classes, piece=1), held_out) == expected
    stretch = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)) / 5 + torch.eye(24)
    moved = [(given @ stretch - 40, ids, mask) for given, ids, mask in (training, held_out)]
    found = scored(fitted(moved[0], classes), moved[1])
    assert found.accuracy == pytest.approx(expected.accuracy, abs=0.02)


def test_of_many_rows_some_are_kept() -> None:
    training = side(0, 200, 2, length=12)
    counts = []
    for every in (1, 4):
        probe = Probe(24, torch.arange(12), CPU, every)
        probe.add(*training, torch.arange(200))
        counts.append(sum(map(len, probe._features)))
        assert {number % every for numbers in probe._batches(ALONE) for number in numbers} == {0}
        assert scored(probe.fit(ALONE), training).accuracy > 0.95
    assert counts[1] == pytest.approx(counts[0] / 4, rel=0.05)


def test_every_row_has_its_turn_in_every_pass() -> None:
    probe = Probe(24, torch.arange(12), CPU)
    probe.add(*side(0, 30, 2), torch.arange(30))
    found = probe._batches(ALONE)
    assert len(found) >= module.UPDATES and max(map(len, found)) <= module.ROWS
    assert sorted(number for part in found[: math.ceil(30 / module.ROWS)] for number in part) == list(range(30))


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
