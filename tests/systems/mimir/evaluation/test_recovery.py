"""A classifier of runs, and what it recovers of classes that can, and that cannot, be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.systems.mimir.evaluation.recovery import KmerClassifier, confusion, recovery
from pipeline.systems.mimir.peptides import Peptides
from tests.systems.mimir.evaluation.sets import independent, peptides

MOTIFS = np.array([[0, 0, 1, 1], [2, 3, 2, 3], [3, 0, 3, 1]])


def planted(generator: np.random.Generator, count: int, share: float = 1.0) -> tuple[Peptides, np.ndarray]:
    """Peptides that hold their class's motif with probability `share`, and their classes."""
    found, classes = independent(generator, count), generator.integers(0, len(MOTIFS), count)
    for row in np.flatnonzero(generator.random(count) < share):
        start = generator.integers(0, found.lengths[row] - 3)
        found.letters[row, start : start + 4] = MOTIFS[classes[row]]
    return found, classes


def test_what_was_planted_is_recovered_and_what_was_not_is_at_chance() -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    classifier = KmerClassifier(*planted(generator, 1500), 4)
    drawn, classes = planted(generator, 600)
    found = recovery(classifier.scores(drawn), classes)
    assert found.recovered.low > 0.8 > found.upper
    assert found.shuffled == pytest.approx(1 / 3, abs=0.01) and found.shuffled < found.upper < 0.4
    drawn, classes = planted(generator, 600, share=0.0)
    found = recovery(classifier.scores(drawn), classes)
    assert found.recovered.low < 1 / 3 < found.recovered.high
    assert found.recovered.value < found.upper + 0.02


def test_scores_are_log_likelihoods_of_the_smoothed_shares() -> None:
    training, classes = peptides(["ABAB", "ABA", "CC", "DCC"]), np.array([0, 0, 1, 1])
    classifier = KmerClassifier(training, classes, 4, k=2)
    assert np.exp(classifier.log_shares).sum(1) == pytest.approx(1.0)
    everywhere = np.ones(16)
    for runs in (["AB", "BA", "AB"], ["AB", "BA"], ["CC"], ["DC", "CC"]):
        for run in runs:
            everywhere["ABCD".index(run[0]) * 4 + "ABCD".index(run[1])] += 1
    everywhere /= everywhere.sum()
    shares = [
        (np.array([3, 2]) + classifier.weight * everywhere[[1, 4]]) / (5 + classifier.weight),
        (np.array([0, 0]) + classifier.weight * everywhere[[1, 4]]) / (3 + classifier.weight),
    ]
    wanted = [np.log(share).sum() for share in shares]
    assert classifier.scores(peptides(["ABA"]))[0] == pytest.approx(wanted)


def test_classes_of_one_composition_are_smoothed_to_it() -> None:
    generator = np.random.Generator(np.random.PCG64(4))
    alike = KmerClassifier(independent(generator, 500), generator.integers(0, 5, 500), 4)
    apart = KmerClassifier(*planted(generator, 500), 4)
    assert alike.weight >= 1e4 > apart.weight


def test_rare_classes_count_as_much_as_frequent_ones() -> None:
    """All are taken for the frequent class: right in 90 %, and no better than a guess."""
    scores, classes = np.tile([1.0, 0.0], (100, 1)), np.repeat([0, 1], [90, 10])
    found = recovery(scores, classes)
    assert found.recovered.value == pytest.approx(0.5) == found.shuffled


def test_the_interval_is_over_groups() -> None:
    generator = np.random.Generator(np.random.PCG64(6))
    classes = np.arange(40) % 2
    scores = np.repeat(np.eye(2)[classes ^ (generator.random(40) < 0.3)], 20, axis=0)
    apart, together = (recovery(scores, np.repeat(classes, 20), of).recovered for of in (None, np.arange(800) // 20))
    assert together.value == apart.value and together.high - together.low > 3 * (apart.high - apart.low)


def test_nothing_is_recovered_of_nothing() -> None:
    assert np.isnan(recovery(np.zeros((0, 3)), np.zeros(0, np.int64)).recovered.value)


def test_confusion_has_a_row_for_each_class() -> None:
    scores = np.eye(3)[[0, 0, 1, 2]]
    found = confusion(scores, np.array([0, 1, 1, 1]), np.array([0, 1, 2]))
    assert found[0].tolist() == [1.0, 0.0, 0.0] and found[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert np.isnan(found[2]).all()
