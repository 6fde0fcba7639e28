"""What was answered about long text, as shares with intervals: scalars, a curve per form, a heat map of needles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.data.text_tasks import CANDIDATES
from pipeline.heat_map import HeatMap
from pipeline.lm.binomial import wilson
from pipeline.lm.held_out import Modes, scalar_prefix
from pipeline.system import Curve, Evaluation


class Answer(NamedTuple):
    """What one mode says to one question."""

    mode: str
    length: int
    form: str
    depth: float | None
    chosen: bool
    """Whether the right candidate is the likeliest."""
    exact: bool
    """Whether every token of the right answer is the likeliest of all: what greedy decoding would write."""


def summarise(
    answers: Sequence[Answer], modes: Modes, lengths: Sequence[int], edges: Mapping[str, float]
) -> Evaluation:
    """Shares of right answers by mode, length, form and depth, with Wilson's intervals over texts."""
    forms = list(dict.fromkeys(answer.form for answer in answers))
    cells: dict[tuple[str, str, int, float | None], list[int]] = {}
    for answer in answers:
        for form, right in ((answer.form, answer.chosen), (f"exact/{answer.form}", answer.exact)):
            # At its depth, and over all depths.
            for depth in {answer.depth, None}:
                cell = cells.setdefault((answer.mode, form, answer.length, depth), [0, 0])
                cell[0] += right
                cell[1] += 1

    def share(mode: str, form: str, length: int, depth: float | None = None) -> float:
        right, count = cells[mode, form, length, depth]
        return right / count

    def ends(mode: str, form: str, length: int, depth: float | None = None) -> tuple[float, float]:
        return wilson(*cells[mode, form, length, depth])

    scalars = {
        f"{scalar_prefix(modes, mode)}{kind}{form}/{length}": share(mode, f"{kind}{form}", length)
        for mode in modes
        for kind in ("", "exact/")
        for form in forms
        for length in lengths
    }
    curves = {}
    for form in forms:
        bounds = {mode: [ends(mode, form, length) for length in lengths] for mode in modes}
        curves[f"text_{form.replace(' ', '_')}"] = Curve(
            f"Questions about long text: {form}",
            "tokens of the text",
            "share of right answers",
            tuple(map(float, lengths)),
            {mode: tuple(share(mode, form, length) for length in lengths) for mode in modes},
            log_x=True,
            intervals={
                mode: (tuple(a for a, _ in pairs), tuple(b for _, b in pairs)) for mode, pairs in bounds.items()
            },
            counts=tuple(cells[next(iter(modes)), form, length, None][1] for length in lengths),
            levels={f"chance, 1 in {CANDIDATES}": 1 / CANDIDATES},
            edges=dict(edges),
        )
    depths = sorted({answer.depth for answer in answers if answer.depth is not None})
    if not depths:
        return Evaluation(scalars, curves)

    def grid(value: Any, mode: str) -> Any:
        return tuple(tuple(value(mode, "needle", length, depth) for length in lengths) for depth in depths)

    heat_map = HeatMap(
        f"Needle in a haystack, {len(depths)} needles a text",
        "tokens of the text",
        "depth of the needle",
        tuple(map(float, lengths)),
        tuple(depths),
        {mode: grid(share, mode) for mode in modes},
        {mode: grid(ends, mode) for mode in modes},
        cells[next(iter(modes)), "needle", lengths[0], depths[0]][1],
        1 / CANDIDATES,
    )
    return Evaluation(scalars, curves, heat_maps={"needle": heat_map})
