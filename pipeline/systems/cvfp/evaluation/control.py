"""Token prediction beside what has no context: a unigram model, and a model trained alike with its context at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from pipeline.evaluation_result import Curve, Evaluation
from pipeline.lm.documents import interval

MODEL, CONTROL, ABLATED, UNIGRAM, LABELS = "model", "control", "context_zero", "unigram", "labels"
NAMES = {
    MODEL: "with its context",
    CONTROL: "trained with its context at zero",
    ABLATED: "same weights, context at zero",
    UNIGRAM: "unigram",
}

Sums = Mapping[str, Tensor]


def right(name: str) -> str:
    """Beside the nats of this name: of how many labels its likeliest token is the right one."""
    return f"right/{name}"


def compared(sums: Sums) -> Evaluation:
    """Perplexities of held-out documents, and their ratio to the model's: `prediction/...` scalars, and a picture.

    `sums`: nats by name, of MODEL and others of NAMES, and LABELS, each [documents], of the same labels; where there is
    `right` of a name, also its accuracy (`prediction/accuracy_NAME`), with the same interval. A ratio is
    exp of the mean difference per label, with a 95 % interval of it over documents, in which both sides are of the same
    documents: 1.1 means that the other's perplexity is 10 % above the model's.
    """
    binned = {name: value.double().cpu().reshape(-1, 1) for name, value in sums.items()}
    kept = binned[LABELS][:, 0] > 0
    binned = {name: value[kept] for name, value in binned.items()}
    whole = {name: value.sum(0) for name, value in binned.items()}
    scalars = {"prediction/labels": float(whole[LABELS]), "prediction/documents": float(kept.sum())}
    names = [name for name in NAMES if name in sums]
    values, lows, highs = [], [], []
    for name in names:
        value, low, high = _with_interval(partial(_perplexity, name), binned, whole)
        scalars[f"prediction/ppl_{name}"] = value
        if right(name) in sums:
            accuracy, at_least, at_most = _with_interval(partial(_accuracy, name), binned, whole)
            key = f"prediction/accuracy_{name}"
            scalars |= {key: accuracy, f"{key}_low": at_least, f"{key}_high": at_most}
        values.append(value)
        lows.append(low)
        highs.append(high)
        if name != MODEL:
            value, low, high = _with_interval(partial(_ratio, name), binned, whole)
            key = f"prediction/ratio_{name}"
            scalars |= {key: value, f"{key}_low": low, f"{key}_high": high}
    curve = Curve(
        "Held-out perplexity", "", "perplexity", tuple(map(float, range(len(names)))), {"perplexity": tuple(values)},
        intervals={"perplexity": (tuple(lows), tuple(highs))}, names=tuple(NAMES[name] for name in names),
    )  # fmt: skip
    return Evaluation(scalars, {"prediction": curve})


def _perplexity(name: str, sums: Sums) -> Tensor:
    return (sums[name] / sums[LABELS]).exp()


def _accuracy(name: str, sums: Sums) -> Tensor:
    return sums[right(name)] / sums[LABELS]


def _ratio(name: str, sums: Sums) -> Tensor:
    return ((sums[name] - sums[MODEL]) / sums[LABELS]).exp()


def _with_interval(statistic: partial[Tensor], sums: Sums, whole: Sums) -> tuple[float, float, float]:
    if not whole[LABELS] > 0:
        return math.nan, math.nan, math.nan
    (low,), (high,) = interval(sums, statistic)
    return float(statistic(whole)), low, high
