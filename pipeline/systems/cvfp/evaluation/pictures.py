"""Pictures of what is measured of contexts, trained and not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.evaluation_result import Curve
from pipeline.systems.cvfp.evaluation.baselines import Measured
from pipeline.systems.cvfp.evaluation.checks import IDENTITY, LEAST_NORM, SAME_COSINE, SAME_DISTANCE
from pipeline.systems.cvfp.evaluation.probe import ProbeResult
from pipeline.systems.cvfp.evaluation.rank import effective_rank

LEAST = 1e-20
"""Below it a difference is drawn as this."""
INDEPENDENT = "independent normal numbers"


def all_of(
    found: Mapping[str, Measured], gaussian: Tensor, independent: Mapping[str, float], threshold: float
) -> dict[str, Curve]:
    """By the names of their files; `found` by what the weights are, `independent` figures and singular values
    `gaussian` those of independent normal numbers in place of contexts."""
    figures = {**{name: one.figures() for name, one in found.items()}, INDEPENDENT: independent}
    return {
        "effective_rank": rank_curve(found, gaussian),
        "spectrum": spectrum_curve(found, gaussian),
        "final_diff": passes_curve(found),
        "forgetting": forgetting_curve(found, threshold),
        "norms": norms_curve(found),
        "identity": identity_curve(figures),
        "attractor": attractor_curve(figures),
    }


def rank_curve(found: Mapping[str, Measured], gaussian: Tensor) -> Curve:
    width = next(iter(found.values())).val.width
    series = {
        name: tuple(sums.effective_rank() / width for sums in (one.train, one.val)) for name, one in found.items()
    }
    series[INDEPENDENT] = (effective_rank(gaussian) / width,) * 2
    tokens = next(iter(found.values())).val.count
    title = f"Effective rank of the contexts of {tokens:,} tokens"
    return Curve(title, "", "share of the width", (0.0, 1.0), series, names=("training", "validation"))


def spectrum_curve(found: Mapping[str, Measured], gaussian: Tensor) -> Curve:
    """Singular values of held-out contexts as shares of their sum, by their number."""
    width = next(iter(found.values())).val.width
    values = {name: one.val.values.cpu() for name, one in found.items()}
    padded = torch.zeros(width, dtype=torch.float64)
    padded[: len(gaussian)] = gaussian[:width]
    values[INDEPENDENT] = padded
    shown = places(width)
    series = {name: tuple(_log10((one / one.sum().clamp_min(LEAST))[shown])) for name, one in values.items()}
    return Curve(
        "Spectrum of held-out contexts", "singular value", "log10 of its share of their sum", numbers(shown), series,
        log_x=True,
    )  # fmt: skip


def passes_curve(found: Mapping[str, Measured]) -> Curve:
    """Mean distance of the contexts of one pass and the next."""
    x = tuple(float(number + 2) for number in range(len(next(iter(found.values())).passes.differences)))
    differences = {name: torch.tensor(one.passes.differences, dtype=torch.float64) for name, one in found.items()}
    series = {name: tuple(_log10(values)) for name, values in differences.items()}
    return Curve(
        "Change from pass to pass, first 100 training tokens", "pass", "log10 of the mean distance", x, series,
        levels={"final_diff of 0.001": -3.0},
    )  # fmt: skip


def forgetting_curve(found: Mapping[str, Measured], threshold: float) -> Curve:
    """How far apart two contexts of a token are that began at zero and at another document's end."""
    shown = places(len(next(iter(found.values())).positions.squares))
    return Curve(
        "Forgetting of the start, held out", "position (tokens)", "log10 of the mean squared difference",
        numbers(shown), {name: tuple(_log10(one.positions.squares[shown])) for name, one in found.items()},
        log_x=True, levels={f"threshold {threshold:g}": math.log10(threshold)},
    )  # fmt: skip


def norms_curve(found: Mapping[str, Measured]) -> Curve:
    shown = places(len(next(iter(found.values())).positions.norms))
    norms = {name: tuple(one.positions.norms[shown].tolist()) for name, one in found.items()}
    return Curve("Norm of held-out contexts", "position (tokens)", "mean norm", numbers(shown), norms, log_x=True)


def identity_curve(figures: Mapping[str, Mapping[str, float]]) -> Curve:
    """Whether the blocks leave contexts as they are, or make them the token's embedding: figures by what the weights
    are."""
    series = {
        "context before and after the blocks": _of_each(figures, "identity_cosine"),
        "held-out context and embedding": _of_each(figures, "embedding_cosine"),
    }
    return Curve(
        "Identity check", "", "mean cosine", _numbered(figures), series,
        levels={f"an identity from {IDENTITY:g} on": IDENTITY}, names=tuple(figures),
    )  # fmt: skip


def attractor_curve(figures: Mapping[str, Mapping[str, float]]) -> Curve:
    """Whether all contexts are one, or zero: figures by what the weights are. 1 - cosine in place of the cosine, since
    it is what is small then, as the distance and the norm are."""
    apart = [1 - cosine for cosine in _of_each(figures, "cosine_of_contexts")]
    series = {
        "distance of two contexts": _of_each(figures, "distance_of_contexts"),
        "norm": _of_each(figures, "norm"),
        "1 - cosine of two contexts": apart,
    }
    levels = {
        f"one context: distance below {SAME_DISTANCE:g}; zero: norm below {LEAST_NORM:g}": math.log10(SAME_DISTANCE),
        f"one context: cosine above {SAME_COSINE:g}": math.log10(1 - SAME_COSINE),
    }
    drawn = {name: tuple(_log10(torch.tensor(values, dtype=torch.float64))) for name, values in series.items()}
    return Curve(
        "Attractor check, held out", "", "log10", _numbered(figures), drawn, levels=levels,
        names=tuple(figures),
    )  # fmt: skip


def _of_each(figures: Mapping[str, Mapping[str, float]], scalar: str) -> tuple[float, ...]:
    return tuple(one[scalar] for one in figures.values())


def _numbered(named: Mapping[str, object]) -> tuple[float, ...]:
    return tuple(map(float, range(len(named))))


def probe_curve(probes: Mapping[str, tuple[ProbeResult, ProbeResult]]) -> Curve:
    """What a linear map reads of the token two back, from contexts and from embeddings."""
    series = {
        "from the context": tuple(context.accuracy for context, _ in probes.values()),
        "from the embedding": tuple(embedding.accuracy for _, embedding in probes.values()),
        "most frequent token": tuple(context.most_frequent for context, _ in probes.values()),
    }
    return Curve(
        "Token two back, read linearly", "", "share of held-out tokens", _numbered(probes), series, names=tuple(probes)
    )


def places(count: int) -> list[int]:
    """Places that are drawn of so many, from 0: powers of two, those half-way to the next, and the last."""
    powers = [2**power for power in range(count.bit_length())]
    return sorted({number - 1 for power in powers for number in (power, power * 3 // 2, count) if number <= count})


def numbers(shown: list[int]) -> tuple[float, ...]:
    """Places, counted from 1."""
    return tuple(float(place + 1) for place in shown)


def _log10(values: Tensor) -> list[float]:
    return torch.log10(values.double().clamp_min(LEAST)).tolist()
