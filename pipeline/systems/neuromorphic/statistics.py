"""The metrics of a step by the reference's names, as sums and counts on the device: nothing here waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.parallel.loss import reduce_sums
from pipeline.parallel.topology import Topology
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.facts import FactsBatch
from pipeline.systems.neuromorphic.memory import episodic, procedural
from pipeline.systems.neuromorphic.model.model import NeuromorphicOutput
from pipeline.systems.neuromorphic.state import StreamState, Uses

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, count) by name; the mean is the metric."""
GATES = ("gate_a_mean", "gate_a_saturation", "gate_b_mean", "gate_b_magnitude", "h_norm")
PROCEDURAL = ("a_mean", "a_max", "a_sum", "nonzero", "elig_norm")
EPISODIC = ("S_mean", "S_max", "S_sum", "nonzero")
"""By layer and column, and by column: the names of a memory's measures."""
BY_COLUMN = {"pm_commit_rate": "pm_commit_rate", "em_novelty": "em_novelty_mean", "em_gain": "em_g_em_mean"}
"""From a measure of the model to the name that has a column behind it."""
MEANS = (
    "wm_entropy",
    "pm_commit_rate", "pm_gain", "pm_retention", "pm_temperature", "pm_written",
    "em_gain", "em_decay", "em_temperature", "em_aversion", "em_written", "em_matched",
)  # fmt: skip
"""Measures whose mean over layers and columns is a metric NAME_mean."""
FACTS_RIGHT = ("facts_right", "facts_right_later")
"""Shares of right answers of the facts task: about facts of the same document, and of earlier ones."""
LOW_VALID, SATURATED = 0.5, 0.95
"""Below this share of labels, and above this use of a memory's budget or share of saturated gates, a step warns."""


def named_statistics(statistics: Mapping[str, tuple[Tensor, Tensor]]) -> Metrics:
    """The metrics of what the model measured, `NeuromorphicOutput.statistics`."""
    found: Metrics = {}
    for name, (total, count) in statistics.items():
        kind, _, measure = name.partition("_")
        if name in GATES or (kind == "pm" and measure in PROCEDURAL):
            start, short = ("", name) if name in GATES else ("pm_", measure)
            for layer, row in enumerate(total.unbind(0)):
                for column, value in enumerate(row.unbind(0)):
                    found[f"{start}b{column}_l{layer}_{short}"] = (value, count)
        elif kind == "em" and measure in EPISODIC:
            found |= {f"em_b{b}_{measure}": (value, count) for b, value in enumerate(total.unbind(0))}
        if name in BY_COLUMN:
            by_column = total.mean(0) if total.dim() == 2 else total
            found |= {f"{BY_COLUMN[name]}_b{b}": (value, count) for b, value in enumerate(by_column.unbind(0))}
        if name == "wm_entropy":
            found |= {f"wm_entropy_h{head}": (value, count) for head, value in enumerate(total.unbind(0))}
        if name == "wm_buffer_util":
            found[name] = (total, count)
        if name in MEANS:
            found[f"{name}_mean"] = (total.mean(), count)
    if "gate_a_saturation" in statistics:
        total, count = statistics["gate_a_saturation"]
        found["warn_gate_saturation"] = _flag(total.mean() / count > SATURATED)
    return found


def step_metrics(
    batch: TokenBatch,
    before: StreamState | None,
    output: NeuromorphicOutput,
    uses: Uses,
    config: NeuromorphicConfig,
    eos_id: int | None,
) -> Metrics:
    """What costs next to nothing, of every step: shares of its tokens, and how full the memories are after it.

    before: the state that the step began with; None: there was none. eos_id: of the tokens that end a document; None:
    it is not known. `valid_tokens` is of a micro-batch; `reg` is the weighted penalty of strengths, a mean over rows.
    """
    span = config.span
    ids, labels, segments = batch.input_ids, batch.labels, batch.segment_ids
    tokens = _number(ids.numel(), ids)
    counted = labels != IGNORED
    spans = rearrange(segments, "n (s p) -> n s p", p=span)
    current = spans == spans[..., -1:]
    valid = (current & rearrange(counted, "n (s p) -> n s p", p=span)).sum()
    found: Metrics = {
        **token_shares(batch, before, eos_id),
        "valid_tokens": (counted.sum(), _number(1, ids)),
        "mean_span_valid_tokens": (valid, tokens / span),
        "warn_low_valid_fraction": _flag(counted.sum() / tokens < LOW_VALID),
    }
    penalty = sum((value.detach() for value in output.penalties.values()), _number(0, ids))
    found["reg"] = (config.strength_penalty * penalty, _number(batch.rows, ids))
    saturated = _number(0, ids)
    for name, (memory, budget) in {
        "pm": ("procedural", procedural.BUDGET), "em": ("episodic", episodic.BUDGET)
    }.items():  # fmt: skip
        if getattr(uses, memory) != "on":
            continue
        strengths = getattr(output.state, memory).strengths.detach()
        use = strengths.sum(-1).mean() / budget
        found[f"{name}_budget_util_global"] = (use, _number(1, ids))
        saturated = torch.maximum(saturated, use)
        if uses.lifelong:
            found[f"{name}_budget_util"] = found[f"{name}_budget_util_global"]
            if before is not None:
                found[f"{name}_persistence"] = _persistence(getattr(before, memory).strengths, strengths)
    found["warn_memory_saturation"] = _flag(saturated > SATURATED)
    return found


def token_shares(batch: TokenBatch, before: StreamState | None, eos_id: int | None) -> Metrics:
    """Shares of the tokens of a step: with a counted label, that begin a document, that end one. Arguments as those of
    `step_metrics`; without `eos_id` the last is left out."""
    ids, segments = batch.input_ids, batch.segment_ids
    tokens = _number(ids.numel(), ids)
    first = torch.full_like(segments[:, 0], -1) if before is None else before.segment
    resets = torch.cat([first[:, None], segments[:, :-1]], 1) != segments
    found = {"valid_fraction": (batch.labels != IGNORED, tokens), "reset_fraction": (resets, tokens)}
    if eos_id is not None:
        found["eot_input_fraction"] = (ids == eos_id, tokens)
    return {name: (where.sum(), count) for name, (where, count) in found.items()}


def right_answers(batch: FactsBatch, predictions: Tensor) -> Metrics:
    """Shares of right answers, by name: of questions about facts of the same document, and about those of earlier
    ones. predictions: [rows, T] token ids."""
    right, lag = predictions == batch.labels, batch.documents
    return {
        name: ((right & about).sum(), about.sum()) for name, about in zip(FACTS_RIGHT, (lag == 0, lag > 0), strict=True)
    }


class HeldOutShares:
    """Shares of the tokens of an evaluation, which its `forward` adds up."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, shares: Metrics) -> None:
        """Of a micro-batch, as `token_shares` and `right_answers` give them."""
        for name, pair in shares.items():
            for part, value in zip(("sum", "count"), pair, strict=True):
                key = f"{part}/{name}"
                self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value

    def means(self, topology: Topology) -> dict[str, float]:
        """Over all ranks, without those of no tokens. Collective."""
        device = next(iter(self._sums.values())).device
        totals = reduce_sums(self._sums, topology, device)
        names = [key.removeprefix("sum/") for key in totals if key.startswith("sum/")]
        return {
            name: float(totals[f"sum/{name}"] / totals[f"count/{name}"]) for name in names if totals[f"count/{name}"]
        }


def _persistence(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the strength before a step that is there after it."""
    return torch.minimum(before, after).sum(), before.sum()


def _flag(condition: Tensor) -> tuple[Tensor, Tensor]:
    return condition.float(), _number(1, condition)


def _number(value: float, like: Tensor) -> Tensor:
    return torch.full((), float(value), device=like.device)


MODULES = {
    "embedding.": "embedding", "head.": "head", "column_input.": "columns", "working": "wm",
    "procedural.neuromodulator": "pm_neuromodulator", "procedural.": "pm",
    "episodic.neuromodulator": "em_neuromodulator", "episodic": "em", "layers.": "layers", "decoder.": "decoder",
}  # fmt: skip
"""From the beginnings of parameters' names to the modules whose gradients' norms are metrics, the first that fits."""


def gradient_squares(name: str, gradient: Tensor) -> dict[str, Tensor]:
    """Sums of squares of the gradient of a parameter, by the norms that they are part of: gnorm_MODULE, and of the
    recurrent layers, whose columns are stacked, gnorm_b{column}_l{layer}."""
    module = next(module for start, module in MODULES.items() if name.startswith(start))
    squares = gradient.float().square()
    found = {f"gnorm_{module}": squares.sum()}
    if module == "layers":
        layer = int(name.split(".")[1])
        by_column = squares.flatten(1).sum(1)
        found |= {f"gnorm_b{column}_l{layer}": value for column, value in enumerate(by_column.unbind(0))}
    return found
