"""The process of known entropy: its probabilities against a sum over all peptides, and its draws against both."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.systems.mimir.data.process import (
    COMPOSITION,
    ENTROPY,
    MARKERS,
    PAIRS,
    RESIDUES,
    Process,
    ProcessSettings,
    occurrences,
    read_process,
)
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING


def law_over_all_peptides(process: Process, motif: str, length: int) -> np.ndarray:
    """Probability of every peptide [20, ..., 20], by the sum over the places of the motif."""
    independent = np.array(1.0)
    for _ in range(length):
        independent = np.multiply.outer(independent, COMPOSITION)
    planted = np.zeros_like(independent)
    starts = range(min(process.settings.places or length, length - len(motif) + 1))
    for start in starts:
        fixed: list[slice | int] = [slice(None)] * length
        fixed[start : start + len(motif)] = [RESIDUES.index(letter) for letter in motif]
        rest = np.array(1.0)
        for _ in range(length - len(motif)):
            rest = np.multiply.outer(rest, COMPOSITION)
        planted[tuple(fixed)] += rest / len(starts)
    share = process.settings.planted
    return (1 - share) * independent + share * planted


@pytest.mark.parametrize(("planted", "places"), [(0.7, 0), (1.0, 0), (0.9, 2), (0.9, 1)])
def test_entropy_and_probabilities_are_those_of_the_sum_over_all_peptides(planted: float, places: int) -> None:
    process = Process(ProcessSettings(2, motif=2, planted=planted, places=places, min_length=3, max_length=4))
    for target, length in itertools.product(process.target_names, process.lengths):
        law = law_over_all_peptides(process, process.motif_of(target), length)
        assert law.sum() == pytest.approx(1, abs=1e-12)
        seen = law[law > 0]
        expected = -(seen * np.log(seen)).sum()
        assert process.entropy(INTERACTING, target, length) == pytest.approx(expected, abs=1e-9)
        generator = np.random.default_rng(length)
        some = [tuple(generator.integers(0, 20, length)) for _ in range(20)] + [tuple(np.argwhere(law == law.max())[0])]
        for place in some:
            text = "".join(RESIDUES[residue] for residue in place)
            found = process.log_probability(text, INTERACTING, target)
            assert math.exp(found) == pytest.approx(law[place], rel=1e-9, abs=0)


@pytest.mark.parametrize("motif", ["DD", "DK"])
def test_the_law_of_how_often_a_motif_stands_in_independent_residues(motif: str) -> None:
    """Also of one that overlaps itself."""
    length = 4
    independent = np.array(1.0)
    for _ in range(length):
        independent = np.multiply.outer(independent, COMPOSITION)
    places = np.indices(independent.shape)
    first, second = (RESIDUES.index(letter) for letter in motif)
    counts = sum((places[k] == first) & (places[k + 1] == second) for k in range(length - 1))
    expected = [independent[counts == count].sum() for count in range(length)]
    np.testing.assert_allclose(occurrences(motif, length), expected, atol=1e-14)


def test_the_composition_has_the_entropy_of_swiss_prot() -> None:
    assert pytest.approx(2.889, abs=5e-4) == ENTROPY
    process = Process(ProcessSettings())
    assert process.entropy_per_residue(BACKGROUND) == pytest.approx(ENTROPY)
    assert process.log_probability("AX", BACKGROUND) == -math.inf


@pytest.mark.parametrize("places", [0, 3])
def test_draws_have_the_entropy_and_the_motifs_of_their_targets_alone(places: int) -> None:
    process = Process(ProcessSettings(places=places))
    count = 4000
    targets = np.arange(count) % len(process.motifs)
    texts = process.draw(np.full(count, INTERACTING), targets, np.random.default_rng(0))
    assert {len(text) for text in texts} == set(process.lengths)
    names = [process.target_names[target] for target in targets]
    excess = np.array(
        [
            -process.log_probability(text, INTERACTING, name) - process.entropy(INTERACTING, name, len(text))
            for text, name in zip(texts, names, strict=True)
        ]
    )
    assert abs(excess.mean()) < 4 * excess.std() / math.sqrt(count)
    has = np.array([[motif in text for motif in process.motifs] for text in texts])
    own = has[np.arange(count), targets].mean()
    others = (has.sum(1) - has[np.arange(count), targets]).sum() / (count * (len(process.motifs) - 1))
    assert own == pytest.approx(process.settings.planted, abs=0.018)
    assert others < 0.01
    worst = max(has[targets != place, place].mean() for place in range(len(process.motifs)))
    assert worst < 0.02


def test_a_targets_sequence_says_its_motif() -> None:
    process = Process(ProcessSettings(targets=64))
    for sequence, motif in zip(process.target_sequences, process.motifs, strict=True):
        for place, letter in enumerate(motif):
            behind = {after for marker, after in itertools.pairwise(sequence) if marker == MARKERS[place]}
            assert {PAIRS[after] for after in behind} == {letter}
    assert len(set(process.target_sequences)) == 64


def test_a_process_is_read_back(tmp_path: Path) -> None:
    process = Process(ProcessSettings(targets=5, seed=3))
    process.write(tmp_path / "set.process.json")
    again = read_process(tmp_path / "set.process.json")
    assert (again.settings, again.motifs, again.target_sequences) == (
        process.settings,
        process.motifs,
        process.target_sequences,
    )
    (tmp_path / "wrong.json").write_text('{"settings": {"tragets": 3}}')
    with pytest.raises(UserError, match=r"wrong\.json describes no process"):
        read_process(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_process(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": 0}, "--targets is 0: give 1 or more"),
        ({"targets": 1000}, r"--targets 1000: only \d+ motifs of 4 residues differ enough"),
        ({"min_length": 3}, "--min-length 3 has no room for a motif of 4"),
        ({"min_length": 9, "max_length": 8}, "--min-length 9 is above --max-length 8"),
        ({"planted": 1.5}, "--planted is 1.5"),
        ({"places": -1}, "--places is -1"),
        ({"motif": 7}, "--motif is 7: give 2 to 6"),
    ],
)
def test_a_process_that_cannot_be_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Process(ProcessSettings(**settings))
