"""What the losses of `gap_closed` say: scalars, and curves by position, with intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.lm.documents import documents_per_bin, interval
from pipeline.system import Curve, Evaluation

WINDOW, FULL, MEMORY, EMPTIED, SWAPPED, EQUAL = "window", "full", "memory", "emptied", "swapped", "equal"
"""The losses."""
LABELS = {
    WINDOW: "window, memory off",
    FULL: "full attention, memory off",
    MEMORY: "memory",
    EMPTIED: "memory emptied at every window",
    SWAPPED: "memory of another document",
    EQUAL: "window of equal state, memory off",
}
"""Their curves."""
CLOSED, CLOSED_OWN, CLOSED_EQUAL = "gap closed", "by the document's own state", "by a window of equal state"
WORTH, SWAP = "worth of remembering", "worth of the document's own state"

Sums = Mapping[str, Tensor]


def gap_report(sums: dict[str, Tensor], window: int, reach: int, bins: int) -> Evaluation:
    """Scalars `gap/...` over all labels beyond the window, and curves by position.

    `sums`: nats of each loss that was measured, and "labels", [documents, bins] each; bin 0 is what lies within
    `window` tokens, and each later bin ends at twice the position of the one before. Nothing was found: empty.
    `reach`: tokens that full attention sees at most.
    """
    if not sums:
        return Evaluation({"gap/labels": 0.0, "gap/documents": 0.0})
    beyond = {name: value[:, 1:].sum(1, keepdim=True) for name, value in sums.items()}
    some = beyond["labels"][:, 0] > 0
    beyond = {name: value[some] for name, value in beyond.items()}
    scalars = {"gap/labels": float(beyond["labels"].sum()), "gap/documents": float(some.sum())}
    for name in LABELS:
        if name in sums:
            scalars[f"gap/loss_{name}"] = float(_loss(name, _whole(beyond)))
    for key, statistic in _statistics(sums).items():
        (value,), (low,), (high,) = statistic(beyond)
        scalars |= {f"gap/{key}": value, f"gap/{key}_low": low, f"gap/{key}_high": high}
    return Evaluation(scalars, _curves(sums, window, reach, bins))


Found = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
"""Per bin: a value, and the lower and upper end of its interval."""


def _statistics(sums: Sums) -> dict[str, Callable[[Sums], Found]]:
    """What is found of sums [documents, bins], by the end of its scalar's name."""
    found: dict[str, Callable[[Sums], Found]] = {"worth": partial(_found, partial(_difference, EMPTIED, MEMORY))}
    if SWAPPED in sums:
        found["swap_cost"] = partial(_found, partial(_difference, SWAPPED, MEMORY))
    if FULL in sums:
        found["closed"] = partial(_with_interval, partial(_closed, (WINDOW, EMPTIED)))
        if SWAPPED in sums:
            found["closed_own"] = partial(_with_interval, partial(_closed, (WINDOW, EMPTIED, SWAPPED)))
        if EQUAL in sums:
            found["closed_equal"] = partial(_with_interval, _closed_by_equal_state)
    return found


def _whole(sums: Sums) -> Sums:
    return {name: value.sum(0) for name, value in sums.items()}


def _found(statistic: Callable[[Sums], Tensor], sums: Sums) -> Found:
    low, high = interval(sums, statistic)
    return tuple(statistic(_whole(sums)).tolist()), low, high


def _loss(name: str, sums: Sums) -> Tensor:
    return sums[name] / sums["labels"]


def _difference(more: str, less: str, sums: Sums) -> Tensor:
    return (sums[more] - sums[less]) / sums["labels"]


def _closed(controls: Sequence[str], sums: Sums) -> Tensor:
    """Share of the gap by which the memory is better than the best of the controls, per bin, of sums over documents;
    NaN where full attention gains nothing."""
    gap = sums[WINDOW] - sums[FULL]
    closed = (torch.stack([sums[name] for name in controls]).amin(0) - sums[MEMORY]) / gap
    return closed.masked_fill(gap <= 0, torch.nan)


def _closed_by_equal_state(sums: Sums) -> Tensor:
    """What a window without memory closes of the gap when it is as much longer as the memory's state is large."""
    gap = sums[WINDOW] - sums[FULL]
    return ((sums[WINDOW] - sums[EQUAL]) / gap).masked_fill(gap <= 0, torch.nan)


def _with_interval(statistic: Callable[[Sums], Tensor], sums: Sums) -> Found:
    """Without an interval where that of the gap itself reaches 0: the ratio could then be anything."""
    value, low, high = _found(statistic, sums)
    at_least, _ = interval(sums, partial(_difference, WINDOW, FULL))
    known = [bottom > 0 for bottom in at_least]
    ends = (tuple(end if sure else math.nan for end, sure in zip(side, known, strict=True)) for side in (low, high))
    return value, *ends  # type: ignore[return-value]


def _curves(sums: dict[str, Tensor], window: int, reach: int, bins: int) -> dict[str, Curve]:
    counts = tuple(sums["labels"].sum(0).long().tolist())
    documents = documents_per_bin(sums["labels"])
    # Within the window nothing can be remembered.
    outside = {name: value[:, 1:] for name, value in sums.items()}
    nothing = math.nan
    edges = {f"window of {window}": float(window)}
    if FULL in sums and reach < window * 2 ** (bins - 1):
        edges[f"full attention of {reach}"] = float(reach)

    def curve(title: str, y_label: str, found: Mapping[str, Found], levels: Mapping[str, float]) -> Curve:
        return Curve(
            title,
            "position in the document (tokens, upper edge)",
            y_label,
            tuple(float(window * 2**index) for index in range(bins)),
            {name: value for name, (value, _, _) in found.items()},
            log_x=True,
            upper_edges=True,
            intervals={name: (low, high) for name, (_, low, high) in found.items()},
            counts=counts,
            documents=documents,
            levels=dict(levels),
            edges=edges,
        )

    def widened(found: Found) -> Found:
        return tuple((nothing, *values) for values in found)  # type: ignore[return-value]

    losses = {label: _found(partial(_loss, name), sums) for name, label in LABELS.items() if name in sums}
    statistics = {key: widened(statistic(outside)) for key, statistic in _statistics(sums).items()} if bins > 1 else {}
    worth = {name: statistics[key] for name, key in ((WORTH, "worth"), (SWAP, "swap_cost")) if key in statistics}
    curves = {"loss_beyond_window": curve("Loss by position", "nats per label", losses, {})}
    if worth:
        curves["worth_of_remembering"] = curve(
            "Worth of remembering by position", "nats per label more\nthan with the memory", worth, {"nothing": 0.0}
        )
    if "closed" in statistics:
        named = {CLOSED: "closed", CLOSED_OWN: "closed_own", CLOSED_EQUAL: "closed_equal"}
        closed = {name: statistics[key] for name, key in named.items() if key in statistics}
        curves["gap_closed"] = curve(
            "Gap closed by position", "share of the gap between window\nand full attention", closed,
            {"nothing": 0.0, "full attention": 1.0},
        )  # fmt: skip
    return curves
