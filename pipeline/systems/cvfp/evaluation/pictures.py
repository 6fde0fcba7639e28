"""Pictures of what is measured of contexts, trained and not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.evaluation_result import Curve
from pipeline.systems.cvfp.evaluation.baselines import Measured
from pipeline.systems.cvfp.evaluation.probe import ProbeResult
from pipeline.systems.cvfp.evaluation.rank import effective_rank

LEAST = 1e-20
"""Below it a difference is drawn as this."""


def all_of(found: Mapping[str, Measured], gaussian: Tensor, threshold: float) -> dict[str, Curve]:
    """By the names of their files; `found` by what the weights are."""
    return {
        "effective_rank": rank_curve(found, gaussian),
        "spectrum": spectrum_curve(found, gaussian),
        "final_diff": passes_curve(found),
        "forgetting": forgetting_curve(found, threshold),
        "norms": norms_curve(found),
    }


def rank_curve(found: Mapping[str, Measured], gaussian: Tensor) -> Curve:
    width = next(iter(found.values())).val.width
    series = {
        name: tuple(sums.effective_rank() / width for sums in (one.train, one.val)) for name, one in found.items()
    }
    series["independent normal numbers"] = (effective_rank(gaussian) / width,) * 2
    tokens = next(iter(found.values())).val.count
    title = f"Effective rank of the contexts of {tokens:,} tokens"
    return Curve(title, "", "share of the width", (0.0, 1.0), series, names=("training", "validation"))


def spectrum_curve(found: Mapping[str, Measured], gaussian: Tensor) -> Curve:
    """Singular values of held-out contexts as shares of their sum, by their number."""
    width = next(iter(found.values())).val.width
    values = {name: one.val.values.cpu() for name, one in found.items()}
    padded = torch.zeros(width, dtype=torch.float64)
    padded[: len(gaussian)] = gaussian[:width]
    values["independent normal numbers"] = padded
    shown = places(width)
    series = {name: tuple(_log10((one / one.sum().clamp_min(LEAST))[shown])) for name, one in values.items()}
    return Curve(
        "Spectrum of held-out contexts", "singular value", "log10 of its share of their sum", numbers(shown), series,
        log_x=True,
    )  # fmt: skip


def passes_curve(found: Mapping[str, Measured]) -> Curve:
    """Mean distance of the contexts of one pass and the next."""
    x = tuple(float(number + 2) for number in range(len(next(iter(found.values())).passes.differences)))
    series = {name: tuple(_log10(torch.tensor(one.passes.differences))) for name, one in found.items()}
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


def probe_curve(probes: Mapping[str, tuple[ProbeResult, ProbeResult]]) -> Curve:
    """What a linear map reads of the token two back, from contexts and from embeddings."""
    places = tuple(map(float, range(len(probes))))
    series = {
        "from the context": tuple(context.accuracy for context, _ in probes.values()),
        "from the embedding": tuple(embedding.accuracy for _, embedding in probes.values()),
        "most frequent token": tuple(context.most_frequent for context, _ in probes.values()),
    }
    return Curve("Token two back, read linearly", "", "share of held-out tokens", places, series, names=tuple(probes))


def places(count: int) -> list[int]:
    """Places that are drawn of so many, from 0: powers of two, those half-way to the next, and the last."""
    powers = [2**power for power in range(count.bit_length())]
    return sorted({number - 1 for power in powers for number in (power, power * 3 // 2, count) if number <= count})


def numbers(shown: list[int]) -> tuple[float, ...]:
    """Places, counted from 1."""
    return tuple(float(place + 1) for place in shown)


def _log10(values: Tensor) -> list[float]:
    return torch.log10(values.double().clamp_min(LEAST)).tolist()
