"""Pictures of the measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.evaluation_result import Curve, Row
from pipeline.heat_map import HeatMap
from pipeline.systems.mimir.evaluation.bits import bits_per_residue
from pipeline.systems.mimir.evaluation.distances import Distance
from pipeline.systems.mimir.evaluation.estimates import Estimate, ratios
from pipeline.systems.mimir.evaluation.held_out import HeldOut
from pipeline.systems.mimir.evaluation.kmers import kmers
from pipeline.systems.mimir.evaluation.likelihoods import Likelihoods
from pipeline.systems.mimir.evaluation.ranking import roc
from pipeline.systems.mimir.evaluation.recovery import confusion
from pipeline.systems.mimir.evaluation.samples import uniqueness_by_count
from pipeline.systems.mimir.peptides import Peptides

OVER = "peptides"
"""What intervals of drawn peptides are over: each stands for itself. Those of held-out ones say it themselves."""
SHOWN = 12
"""Targets of the picture of recovered ones."""


def bits_by_length(found: Mapping[str, tuple[Likelihoods, HeldOut]], entropy_bits: float) -> Curve:
    lengths = sorted({int(length) for _, held_out in found.values() for length in held_out.peptides.lengths})

    def of(one: Likelihoods, held_out: HeldOut, length: int) -> Estimate:
        mine = held_out.peptides.lengths == length
        return bits_per_residue(one.nats[mine], held_out.peptides.lengths[mine], held_out.groups[mine])

    estimates = {kind: [of(*pair, length) for length in lengths] for kind, pair in found.items()}
    over = {kind: held_out.over for kind, (_, held_out) in found.items()}
    return _with_intervals(
        Curve("Bound on the likelihood by length", "residues", "bits per residue", tuple(map(float, lengths)), {},
              interval_over=over, levels={"independent residues": entropy_bits}), estimates
    )  # fmt: skip


def cross_entropy_by_timestep(found: Mapping[str, Likelihoods], floors: np.ndarray) -> Curve:
    timesteps = tuple(float(t) for t in range(1, len(floors) + 1))
    series = {kind: tuple((one.ce.sum(0) / one.counts.sum(0)).tolist()) for kind, one in found.items()}
    series["floor of independent residues"] = tuple(floors.tolist())
    return Curve("Cross-entropy by timestep", "timestep", "nats per residue that counts", timesteps, series)


def compositions(drawn: Mapping[str, Peptides], held_out: Mapping[str, HeldOut], letters: str) -> Curve:
    """Shares of the residues of each set."""
    estimates: dict[str, list[Estimate]] = {}
    groups = {name: found.groups for name, found in held_out.items()}
    over = {name: held_out[name].over if name in held_out else OVER for name in (*drawn, *held_out)}
    for name, peptides in (*drawn.items(), *((name, found.peptides) for name, found in held_out.items())):
        owners, residues = kmers(peptides, 1, len(letters))
        counts = np.zeros((len(peptides), len(letters)))
        np.add.at(counts, (owners, residues), 1.0)
        estimates[name] = ratios(counts, peptides.lengths.astype(np.float64), groups.get(name))
    places = tuple(float(place) for place in range(len(letters)))
    curve = Curve("Residues", "residue", "share", places, {}, interval_over=over, names=tuple(letters))
    return _with_intervals(curve, estimates)


def length_shares(sets: Mapping[str, Peptides], shortest: int, longest: int) -> Curve:
    lengths = np.arange(shortest, longest + 1)
    series = {
        name: tuple(float((peptides.lengths == length).mean()) for length in lengths) for name, peptides in sets.items()
    }
    return Curve("Lengths", "residues", "share of the peptides", tuple(map(float, lengths)), series)


def distance_curve(found: Mapping[str, Mapping[str, Distance]]) -> Curve:
    """Distances that are shares (total variation), of each kind, beside those of equal distributions."""
    names = [name for name in next(iter(found.values())) if name != "length distance"]
    places = tuple(name.removesuffix(" distance") for name in names)
    series: dict[str, tuple[float, ...]] = {}
    intervals = {}
    for kind, distances in found.items():
        series[kind] = tuple(distances[name].value for name in names)
        expected = tuple(distances[name].expected for name in names)
        series[f"{kind}, equal distributions"] = expected
        intervals[f"{kind}, equal distributions"] = (expected, tuple(distances[name].upper for name in names))
    return Curve(
        "Drawn against held out", "", "total variation", tuple(map(float, range(len(names)))), series,
        intervals=intervals, interval_over="permutations", names=places,
    )  # fmt: skip


def uniqueness_curve(sets: Mapping[str, Sequence[str]]) -> Curve:
    """How many of the first so many sequences of each set are different."""
    longest = max(map(len, sets.values()))
    counts = [count for power in range(longest.bit_length()) if (count := 2**power) <= longest]
    series = {
        name: tuple(
            share if count <= len(texts) else np.nan
            for count, share in zip(counts, uniqueness_by_count(texts, counts), strict=True)
        )
        for name, texts in sets.items()
    }
    return Curve("Different peptides", "peptides", "share", tuple(map(float, counts)), series, log_x=True)


def nearest_curve(edits: Mapping[str, np.ndarray]) -> Curve:
    """How many sequences are within so many edits of a training peptide."""
    most = int(max(found.max() for found in edits.values()))
    x = range(most + 1)
    series = {name: tuple(float((found <= distance).mean()) for distance in x) for name, found in edits.items()}
    return Curve("Nearest training peptide", "edits", "share within", tuple(map(float, x)), series)


def quality_curve(rows: Sequence[Row]) -> Curve:
    """Shares of the table of measures, of each kind, with what stands beside them."""
    names = ("validity", "uniqueness", "novelty", "diversity")
    found = {(str(row["measure"]), str(row["of"])): row for row in rows}
    kinds = list(dict.fromkeys(of for name, of in found if name in names))
    series, intervals = {}, {}
    for kind in kinds:
        mine = [found[name, kind] for name in names]
        series[f"{kind}, drawn"] = tuple(_number(row["value"]) for row in mine)
        intervals[f"{kind}, drawn"] = tuple(tuple(_number(row[end]) for row in mine) for end in ("low", "high"))
        series[f"{kind}, held out"] = tuple(_number(row["beside"]) for row in mine)
    places = tuple(map(float, range(len(names))))
    return Curve("Drawn peptides", "", "share", places, series, intervals=intervals, interval_over=OVER, names=names)  # type: ignore[arg-type]


def recovery_curve(rows: Sequence[Row]) -> Curve:
    """What a classifier recovers, and of shuffled classes."""
    mine = [row for row in rows if str(row["measure"]).endswith(" recovered")]
    names = tuple(f"{str(row['measure']).removesuffix(' recovered')}\n{row['of']}" for row in mine)
    low, high = (tuple(_number(row[end]) for row in mine) for end in ("low", "high"))
    series = {
        "recovered": tuple(_number(row["value"]) for row in mine),
        "shuffled": tuple(_number(row["beside"]) for row in mine),
    }
    places = tuple(map(float, range(len(mine))))
    return Curve("Label and target from the peptide", "", "share recovered", places, series,
                 intervals={"recovered": (low, high)}, names=names,
                 interval_over="drawn peptides, or clusters of held-out ones")  # fmt: skip


def roc_curve(ratios: Mapping[str, np.ndarray]) -> Curve:
    rates = np.linspace(0, 1, 101)
    series = {name: tuple(roc(found, rates).tolist()) for name, found in ratios.items()}
    series["chance"] = tuple(rates.tolist())
    return Curve("Likelihood ratio of true and decoy targets", "share of decoys above the threshold",
                 "share of true targets above it", tuple(rates.tolist()), series)  # fmt: skip


def target_map(scores: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> HeatMap:
    """What the most frequent targets that peptides were drawn for are taken for."""
    counts = np.bincount(classes, minlength=len(names))
    shown = np.sort(np.argsort(-counts, kind="stable")[: min(SHOWN, int((counts > 0).sum()))])
    shares = confusion(scores, classes, shown)
    labels = tuple(names[place] for place in shown)
    places = tuple(map(float, shown))
    return HeatMap("Targets recovered from drawn peptides", "recovered", "drawn for", places, places,
                   {"drawn": tuple(map(tuple, shares.tolist()))}, x_names=labels, y_names=labels,
                   share_of="the peptides drawn for a target")  # fmt: skip


def _number(value: str | float | int | None) -> float:
    return np.nan if value is None else float(value)


def _with_intervals(curve: Curve, estimates: Mapping[str, Sequence[Estimate]]) -> Curve:
    for name, found in estimates.items():
        curve.series[name] = tuple(one.value for one in found)
        curve.intervals[name] = (tuple(one.low for one in found), tuple(one.high for one in found))
    return curve
