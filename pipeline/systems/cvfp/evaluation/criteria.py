"""The success criteria of the published guide, with what untrained weights and independent numbers have beside them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.evaluation_result import Row, Table
from pipeline.systems.cvfp.evaluation.checks import IDENTITY, LEAST_NORM, LEAST_SPREAD

GUIDE, RUN = "guide", "this project"
SIGNS: dict[str, Callable[[float, float], bool]] = {">": operator.gt, "<": operator.lt, ">=": operator.ge}
BASELINES = ("random_init", "published_init", "gaussian")
"""Beside what a figure of the trained weights stands: the weights that it began with, those of the published
initialisation, and independent normal numbers in place of contexts."""


PASS, FAIL, UNDECIDABLE = "PASS", "FAIL", "not decidable"


@dataclass(frozen=True)
class Criterion:
    """A figure by the name of its scalar, and what it is to be."""

    name: str
    scalar: str
    sign: str
    wanted: float | str
    """A number, or the scalar that it is compared with."""
    source: str
    baselines: Mapping[str, str]
    """The scalars of the same figure, by baseline."""
    tokens: str | None = None
    """Of an effective rank with a limit of its own: the scalar of how many tokens it is of."""


def _ranks(data: str, gaussian: str = "gaussian") -> dict[str, str]:
    names = {name: f"effective_rank/{name}_{data}" for name in BASELINES[:2]}
    return {**names, "gaussian": f"effective_rank/{gaussian}"}


def _of(scalar: str) -> dict[str, str]:
    return {name: f"{scalar}/{name}" for name in BASELINES}


CRITERIA = (
    Criterion(
        "effective rank / width, training", "effective_rank/train_all", ">", 0.85, GUIDE,
        _ranks("train_all", "gaussian_train_all"), "tokens/train",
    ),
    Criterion(
        "effective rank / width, validation", "effective_rank/val", ">", 0.75, GUIDE, _ranks("val"),
        "effective_rank/tokens",
    ),
    Criterion("final_diff", "final_diff", "<", 1e-3, GUIDE, _of("final_diff")),
    Criterion(
        "mean cosine of context before and after", "identity_cosine", "<", IDENTITY, GUIDE, _of("identity_cosine"),
    ),
    Criterion("mean norm", "norm", ">", LEAST_NORM, GUIDE, _of("norm")),
    Criterion("deviation from the mean context", "spread", ">", LEAST_SPREAD, GUIDE, _of("spread")),
    Criterion("final_diff / norm", "final_diff_relative", "<", 1e-3, RUN, _of("final_diff_relative")),
    Criterion("converged training tokens", "converged", ">=", 0.95, RUN, _of("converged")),
    Criterion(
        "effective rank, validation, above untrained", "effective_rank/val", ">", "effective_rank/random_init_val", RUN,
        _ranks("val"),
    ),
    Criterion("token two back, context / embedding", "probe/ratio", ">=", 2.0, RUN, _of("probe/ratio")),
)  # fmt: skip


def criteria_table(scalars: Mapping[str, float], *, converged: float = 0.95, peak_bytes: float | None = None) -> Table:
    """A row for each criterion whose figure is among the scalars: value, what is wanted, the result, and baselines
    (None where unknown). `converged`: the share of tokens that the run asks for. `peak_bytes`: the most memory that
    the process has had; it is here, so that it did not run out of it.

    The result is PASS or FAIL, which a figure that is no number does; or, where independent normal numbers have no
    effective rank above the limit either, that so few tokens cannot decide it.
    """
    rows: list[Row] = []
    if peak_bytes is not None:
        rows.append(_row("completes in memory, peak GB", peak_bytes / 1e9, "-", PASS, GUIDE, {}))
    for one in CRITERIA:
        wanted = converged if one.scalar == "converged" else one.wanted
        if one.scalar not in scalars or (isinstance(wanted, str) and wanted not in scalars):
            continue
        value, number = scalars[one.scalar], scalars[wanted] if isinstance(wanted, str) else wanted
        beside = {name: scalars[scalar] for name, scalar in one.baselines.items() if scalar in scalars}
        result = PASS if SIGNS[one.sign](value, number) else FAIL
        if one.tokens is not None and one.tokens in scalars and beside.get("gaussian", math.inf) <= number:
            result = f"{UNDECIDABLE} at {scalars[one.tokens]:,.0f} tokens (Gaussian {beside['gaussian']:.1%})"
        rows.append(_row(one.name, value, f"{one.sign} {number:.4g}", result, one.source, beside))
    return rows


def _row(name: str, value: float, wanted: str, result: str, source: str, beside: Mapping[str, float]) -> Row:
    return {
        "criterion": name, "value": float(value), "wanted": wanted, "result": result,
        **{baseline: beside.get(baseline) for baseline in BASELINES}, "of": source,
    }  # fmt: skip


def verdict(table: Table) -> str:
    """How many criteria are met, and which are not."""
    results = [str(row["result"]) for row in table]
    failed = ", ".join(str(row["criterion"]) for row in table if row["result"] == FAIL)
    undecided = sum(result.startswith(UNDECIDABLE) for result in results)
    said = [f"{results.count(PASS)} PASS", f"{results.count(FAIL)} FAIL" + (f" ({failed})" if failed else "")]
    return "criteria: " + ", ".join([*said, *([f"{undecided} {UNDECIDABLE}"] if undecided else [])])


def lines(table: Table) -> list[str]:
    """The table as text, words to the left and numbers to the right."""
    names = list(table[0]) if table else []

    def cell(value: str | float | int | None) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [[name.replace("_", " ") for name in names], *([cell(row[name]) for name in names] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_word = [any(isinstance(row[name], str) for row in table) for name in names]
    return [
        "  ".join(
            text.ljust(width) if word else text.rjust(width)
            for text, width, word in zip(row, widths, is_word, strict=True)
        ).rstrip()
        for row in cells
    ]
