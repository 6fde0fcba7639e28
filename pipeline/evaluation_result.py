"""What an evaluation gives: numbers, curves, tables, and what was drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.heat_map import HeatMap

TASKS = "downstream/"
"""What the names of the scores of tasks begin with among the scalars."""
STDERR, COUNT, CHANCE = "_stderr", "/n", "/chance"
"""How the names of scalars end that say something of a score, and, of a task, how many documents and the expected value
of answers drawn evenly."""
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics of tasks with choices: shares of documents whose right choice comes first."""


def has_chance(metric: str) -> bool:
    """Whether answers drawn evenly have an expected value of this metric."""
    return metric in ACCURACIES


@dataclass(frozen=True)
class Curve:
    """One picture of an evaluation: named series over a common x axis. NaN where nothing was seen."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    series: dict[str, tuple[float, ...]]
    log_x: bool = False
    upper_edges: bool = False
    """Each x is the upper edge of a bin that begins at the x before it."""
    drawn: tuple[str, ...] = ()
    """Series in the picture (none: all); the others stand in its numbers alone."""
    drawn_label: str = ""
    """The picture's y label, where what is drawn is not what `y_label` says."""
    intervals: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    """Lower and upper ends by series: 95 % intervals over `interval_over`."""
    interval_over: str | dict[str, str] = "documents"
    """What is drawn again for them; a dict: by series, where these differ in it."""
    counts: tuple[int, ...] = ()
    """Labels that each point was measured on."""
    documents: tuple[int, ...] = ()
    """Documents that these labels are of."""
    levels: dict[str, float] = field(default_factory=dict)
    """Horizontal lines by their label: what a value of y is compared with."""
    edges: dict[str, float] = field(default_factory=dict)
    """Vertical lines by their label: where on the x axis something begins."""
    names: tuple[str, ...] = ()
    """What each x is called, where it is no number: points then stand for themselves, and no line joins them."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a text, and what followed that text in truth."""

    prompt: str
    written: str
    truth: str


@dataclass(frozen=True)
class Continuations:
    """A sample of several: a text, and a picture where a run draws any."""

    texts: tuple[Continuation, ...]

    def parts(self) -> Iterator[tuple[int, tuple[str, str]]]:
        """The number of each, counted from 1, with a name and a text: prompt, model, truth."""
        for number, text in enumerate(self.texts, 1):
            yield number, ("prompt", text.prompt)
            yield number, ("model", text.written)
            yield number, ("truth", text.truth)

    def __str__(self) -> str:
        blocks = [f"[{number}] {name}\n{text}\n" for number, (name, text) in self.parts()]
        return "\n".join(blocks)


Sample = str | Continuations | Sequence[Any] | Mapping[str, Any]
"""What was drawn from a model: a text, texts that it went on with, or values that JSON can hold."""

Row = Mapping[str, str | float | int | None]
"""A row of a table by the names of the columns, the same names in every row; None where there is nothing to say."""
Table = Sequence[Row]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: scalars for the `val` row, curves for the plots, samples for files of their own. The
    same on every rank."""

    scalars: dict[str, float]
    curves: dict[str, Curve] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    """By the names of their files in OUT/samples."""
    heat_maps: dict[str, HeatMap] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    """By the table's name: a key of evaluation.json; in training a file in OUT/samples."""


def together(*evaluations: Evaluation) -> Evaluation:
    """What several evaluations of the same weights found, as one."""
    return Evaluation(
        *(
            {name: value for found in evaluations for name, value in getattr(found, part.name).items()}
            for part in fields(Evaluation)
        )
    )
