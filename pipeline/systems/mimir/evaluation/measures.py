"""Rows of the table of measures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.evaluation_result import Row
from pipeline.systems.mimir.evaluation.distances import Distance, composition_distance, kmer_distance, length_distance
from pipeline.systems.mimir.evaluation.estimates import Estimate
from pipeline.systems.mimir.evaluation.held_out import HeldOut
from pipeline.systems.mimir.evaluation.ranking import Ranking
from pipeline.systems.mimir.evaluation.recovery import Recovery
from pipeline.systems.mimir.evaluation.samples import diversity, novelty, uniqueness, validity
from pipeline.systems.mimir.peptides import Peptides

RUNS = (2, 3)
"""Residues of the runs whose shares are compared, beside single ones."""


def row(
    measure: str,
    of: str,
    value: Estimate | float,
    beside: float | None = None,
    beside_is: str = "",
    upper: float | None = None,
) -> Row:
    """`beside`: what the value is to be compared with, which `beside_is` names; 95 % of what chance makes of that is
    below `upper`."""
    found = value if isinstance(value, Estimate) else Estimate(value, np.nan, np.nan)
    numbers = {
        "value": found.value, "low": found.low, "high": found.high, "beside": beside, "beside_up_to": upper,
    }  # fmt: skip
    known = {name: None if x is None or not np.isfinite(x) else float(x) for name, x in numbers.items()}
    return {"measure": measure, "of": of, **known, "beside_is": beside_is}


def quality(
    of: str, drawn: list[str], held_out: list[str], training: set[str], shortest: int, longest: int
) -> list[Row]:
    """Whether drawn peptides are possible, different and new, beside as many held-out ones."""
    count = min(len(drawn), len(held_out))
    first = held_out[:count]
    if count < len(drawn):
        beside = f"the first {count} drawn, {uniqueness(drawn[:count]):.4g}; as many held out"
    else:
        beside = "as many held out"
    return [
        row(
            "validity", of, validity(drawn, shortest, longest), validity(held_out, shortest, longest).value, "held out"
        ),
        row("uniqueness", of, uniqueness(drawn), uniqueness(first), beside),
        row("novelty", of, novelty(drawn, training), novelty(held_out, training).value, "held out"),
        row("diversity", of, diversity(drawn), diversity(held_out).value, "held out"),
    ]


def distances(drawn: Peptides, held_out: HeldOut, letters: int) -> dict[str, Distance]:
    """Between drawn and held-out peptides of one kind, by what is compared."""
    other, groups = held_out.peptides, held_out.groups
    runs = {f"{k}-mer distance": kmer_distance(drawn, other, k, letters, groups) for k in RUNS}
    return {
        "composition distance": composition_distance(drawn, other, letters, groups),
        **runs,
        "length distance": length_distance(drawn, other, groups),
    }


def distance_rows(of: str, found: Mapping[str, Distance]) -> list[Row]:
    return [
        row(name, of, distance.value, distance.expected, "equal distributions", distance.upper)
        for name, distance in found.items()
    ]


def recovery_rows(what: str, of: str, drawn: Recovery, held_out: Recovery) -> list[Row]:
    return [
        row(f"{what} recovered", of, drawn.recovered, drawn.shuffled, "shuffled", drawn.upper),
        row(f"{what} recovered", f"{of}, held out", held_out.recovered, held_out.shuffled, "shuffled", held_out.upper),
    ]


def ranking_rows(of: str, found: Ranking) -> list[Row]:
    return [
        row("target AUROC", of, found.auroc, 0.5, "chance"),
        row("target AUROC within a peptide", of, found.within, 0.5, "chance"),
        row("true target first", of, found.first, found.chance, "chance"),
    ]
