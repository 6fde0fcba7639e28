"""What is right of a table of peptides and what is not, each check by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.tokens.verify import Check
from pipeline.errors import UserError, brief, shown
from pipeline.systems.mimir.data.encode import NO_LETTER, encode, lengths_of
from pipeline.systems.mimir.data.table import Table

_LEAST_DIFFERENCE, _LEAST_DEVIATE = 0.02, 3.1
"""The lengths of background and interacting peptides do not match where their histograms differ by this much (total
variation) and so much by chance alone has a probability below 0.001."""


@dataclass(frozen=True)
class Expected:
    """What the sequences of a set must be."""

    letters: str
    min_length: int
    max_length: int
    sequences: Collection[str] | None = None
    """Names of the targets whose amino-acid sequences are known, where they are needed."""


def check_table(table: Table, expected: Expected) -> None:
    """Raises UserError for the first check without which nothing can be trained."""
    for check in _needed(table, expected):
        if check.ok is False:
            raise UserError(f"{check.name}: {check.found}: {check.fix}")


def all_checks(table: Table, expected: Expected) -> Iterator[Check]:
    """Every check, as it is made."""
    for check in _needed(table, expected):
        yield check
        if check.ok is False and check.name == "labels":
            return
    yield _targets(table)
    yield _copies(table, "duplicate pairs", "1")
    yield _copies(table, "duplicate background", "0")
    yield _overlap(table)
    yield _length_match(table)


def _needed(table: Table, expected: Expected) -> Iterator[Check]:
    yield _labels(table)
    yield _letters(table, expected.letters)
    yield _lengths(table, expected)
    yield _background_targets(table)
    if expected.sequences is not None:
        yield _sequences(table, expected.sequences)


def _rows(table: Table, wrong: np.ndarray, say: Callable[[int], str]) -> str:
    """How many rows [N] bool are wrong, and what is wrong with the first."""
    first = int(np.argmax(wrong))
    count = int(wrong.sum())
    more = f" (and {count - 1:,} more rows)" if count > 1 else ""
    return f"{table.place(first)}: {say(first)}{more}"


def _counts(values: pa.StringArray) -> str:
    return (
        f"{pc.sum(pc.equal(values, '1')).as_py():,} interacting, {pc.sum(pc.equal(values, '0')).as_py():,} background"
    )


def _labels(table: Table) -> Check:
    wrong = ~_is(pc.is_in(table.labels, pa.array(["0", "1"])))
    if not wrong.any():
        return Check("labels", True, _counts(table.labels))
    found = _rows(table, wrong, lambda row: f"the label is {shown(table.labels[row].as_py())}")
    return Check("labels", False, found, "give 1 for an interacting peptide, 0 for background")


def _letters(table: Table, letters: str) -> Check:
    lengths = lengths_of(table.sequences)
    longest = int(lengths.max())
    wrong = np.zeros(len(table), bool)
    step = max(1, (1 << 24) // max(1, longest))
    for start in range(0, len(table), step):
        part = table.sequences.slice(start, step)
        wrong[start : start + step] = (encode(part, letters, longest) == NO_LETTER).any(1)
    if not wrong.any():
        return Check("letters", True, f"all of {letters}")

    def say(row: int) -> str:
        text = table.sequences[row].as_py()
        return f"{shown(text)} has {shown(next(letter for letter in text if letter not in letters))}"

    return Check("letters", False, _rows(table, wrong, say), f"give letters of {letters} alone (--model.letters)")


def _lengths(table: Table, expected: Expected) -> Check:
    lengths = lengths_of(table.sequences)
    least, most = expected.min_length, expected.max_length
    wrong = (lengths < least) | (lengths > most)
    if not wrong.any():
        return Check("lengths", True, f"{lengths.min()} to {lengths.max()} residues")
    found = _rows(
        table, wrong, lambda row: f"{brief(table.sequences[row].as_py(), 60) or 'it'} has {lengths[row]} residues"
    )
    return Check(
        "lengths", False, found, f"give {least} to {most}, or change --model.min-length and --model.max-length"
    )


def _background_targets(table: Table) -> Check:
    wrong = _is(pc.and_(pc.equal(table.labels, "0"), pc.not_equal(table.targets, "")))
    if not wrong.any():
        return Check("background targets", True, "none, as it should be")
    found = _rows(table, wrong, lambda row: f"a background peptide with the target {shown(table.targets[row].as_py())}")
    return Check("background targets", False, found, "leave the target of background peptides empty")


def _sequences(table: Table, known: Collection[str]) -> Check:
    names = pc.unique(table.targets).to_pylist()
    missing = sorted(name for name in names if name and name not in known)
    if not missing:
        return Check("target sequences", True, f"known of {sum(map(bool, names)):,} targets")
    row = pc.index(table.targets, missing[0]).as_py()
    more = f" (and {len(missing) - 1:,} more targets)" if len(missing) > 1 else ""
    found = f"{table.place(row)}: the target {shown(missing[0])} has no sequence{more}"
    return Check("target sequences", False, found, "add it to the FASTA file of --model.target-file")


def _targets(table: Table) -> Check:
    interacting = pc.equal(table.labels, "1")
    wrong = _is(pc.and_(interacting, pc.equal(table.targets, "")))
    count = int(wrong.sum())
    if not count:
        return Check("targets", True, f"{len(_names(table)):,} targets")
    if count == int(_is(interacting).sum()):
        return Check("targets", True, "none: the labels alone")
    found = _rows(table, wrong, lambda row: "an interacting peptide without a target")
    return Check("targets", False, found, "name its target, or leave the targets of all rows empty")


def _names(table: Table) -> list[str]:
    return [name for name in pc.unique(table.targets).to_pylist() if name]


def _copies(table: Table, name: str, label: str) -> Check:
    keep = _is(pc.equal(table.labels, label))
    joined = pc.binary_join_element_wise(table.targets, table.sequences, "\t")
    places = np.flatnonzero(keep)
    codes = joined.take(pa.array(places)).dictionary_encode().indices.to_numpy()
    first = np.full(int(codes.max(initial=-1)) + 1, len(codes))
    np.minimum.at(first, codes, np.arange(len(codes)))
    copies = first[codes] != np.arange(len(codes))
    if not copies.any():
        return Check(name, True, "none")
    wrong = np.zeros(len(table), bool)
    wrong[places[copies]] = True

    def say(row: int) -> str:
        earlier = places[first[codes[np.searchsorted(places, row)]]]
        return f"{brief(table.sequences[row].as_py(), 60)} stands at {table.place(int(earlier))} already"

    return Check(name, False, _rows(table, wrong, say), "remove the copies: training reads the first of them alone")


def _overlap(table: Table) -> Check:
    interacting = table.sequences.filter(pc.equal(table.labels, "1"))
    wrong = _is(pc.and_(pc.equal(table.labels, "0"), pc.is_in(table.sequences, interacting)))
    if not wrong.any():
        return Check("overlap", True, "no background peptide interacts")
    found = _rows(table, wrong, lambda row: f"{brief(table.sequences[row].as_py(), 60)} interacts in another row")
    return Check("overlap", False, found, "remove it from the background: training leaves it out")


def _length_match(table: Table) -> Check:
    lengths = lengths_of(table.sequences)
    interacting = _is(pc.equal(table.labels, "1"))
    if interacting.all() or not interacting.any():
        return Check("length match", None, "only one label")
    counts = np.stack(
        [np.bincount(lengths[kind], minlength=int(lengths.max()) + 1) for kind in (interacting, ~interacting)]
    )
    difference = 0.5 * float(np.abs(np.subtract(*(counts / counts.sum(1, keepdims=True)))).sum())
    deviate = _deviate(counts[:, counts.any(0)])
    found = f"the histograms differ by {difference:.2%}, {deviate:+.1f} standard deviations from chance"
    ok = difference < _LEAST_DIFFERENCE or deviate < _LEAST_DEVIATE
    return Check("length match", ok, found, "draw the lengths of the background from those of the interacting peptides")


def _deviate(counts: np.ndarray) -> float:
    """Of two histograms [2, bins], how much their chi-squared statistic is above that of one distribution, in standard
    deviations (Wilson and Hilferty's approximation)."""
    freedom = counts.shape[1] - 1
    if not freedom:
        return 0.0
    means = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    statistic = float(((counts - means) ** 2 / means).sum())
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - 1 + spread) / np.sqrt(spread))


def _is(values: pa.BooleanArray) -> np.ndarray:
    return np.array(values.to_numpy(zero_copy_only=False), bool)
