"""What the system measures of its model beside the loss, as the engine and the commands ask for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import StatefulLoader, TokenBatch
from pipeline.data.tokenizer import Tokenizer
from pipeline.lm.decoding import Decoder
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Evaluation, Phase, Sample, StepContext
from pipeline.systems.neuromorphic import statistics
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.decoding import NeuromorphicDecoder
from pipeline.systems.neuromorphic.evaluation import ablations
from pipeline.systems.neuromorphic.evaluation.lifelong import Lifelong, Options
from pipeline.systems.neuromorphic.evaluation.probes import Probes, TextFacts, TokenFacts
from pipeline.systems.neuromorphic.evaluation.report import evaluation_of
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel, NeuromorphicOutput
from pipeline.systems.neuromorphic.samples import NAME, held_out_texts, text_samples
from pipeline.systems.neuromorphic.state import StreamState, Uses
from pipeline.update_events import UpdateEvents

HELD_OUT_STEPS = 8
"""Held-out steps whose text stands around the facts of the lifelong suite."""


class Measures:
    """A part of the system class: samples, ablations, norms of gradients, decoding, and `eval --suite lifelong`."""

    config: RunConfig
    sizes: NeuromorphicConfig
    reached: str | None

    def uses(self, phase: str) -> Uses:
        """Of the memories in a phase."""
        raise NotImplementedError

    def last_phase(self) -> str:
        """The last phase of the run."""
        raise NotImplementedError

    def tokenizer(self, makers: Mapping[str, str] | None = None) -> Tokenizer:
        """The one whose ids the model reads."""
        raise NotImplementedError

    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[TokenBatch]:
        """As `System.held_out`."""
        raise NotImplementedError

    @cached_property
    def eos_id(self) -> int | None:
        """The id that ends a document; None where the data does not say."""
        return self.tokenizer().eos_id

    def metrics(
        self, batch: TokenBatch, before: StreamState | None, output: NeuromorphicOutput, context: StepContext
    ) -> statistics.Metrics:
        """The metrics of a step: what costs next to nothing, and what the model measured where it was asked to."""
        found = statistics.step_metrics(batch, before, output, self.uses(context.phase), self.sizes, self.eos_id)
        return found | statistics.named_statistics(output.statistics)

    def event_metrics(self, events: UpdateEvents) -> Mapping[str, float]:
        """As `NamesEvents.event_metrics`."""
        found = {"warn_high_grad_norm": events.high_norms, "nan_grad_steps": float(events.skipped)}
        return found if events.restarts is None else {**found, "stream_restarts_total": float(events.restarts)}

    def health(self, metrics: Mapping[str, float]) -> str:
        """As `System.health`: how full the memories are, what is written, and what a logged step warns of."""
        gates = [value for name, value in metrics.items() if name.endswith("gate_a_mean")]
        parts = [f"h kept {sum(gates) / len(gates):.2f}"] if gates else []
        if "wm_entropy_mean" in metrics:
            parts.append(f"WM entropy {metrics['wm_entropy_mean']:.2f}, {metrics['wm_buffer_util']:.0%} of the window")
        if "pm_commit_rate_mean" in metrics:
            parts.append(
                f"PM {metrics['pm_budget_util_global']:.0%} full, commits {metrics['pm_commit_rate_mean']:.2f}"
            )
        if "em_gain_mean" in metrics:
            parts.append(f"EM {metrics['em_budget_util_global']:.0%} full, gain {metrics['em_gain_mean']:.2f}")
        warnings = [name for name, value in metrics.items() if name.startswith("warn_") and value > 0]
        return " | ".join([*parts, *warnings])

    def samples(
        self, model: nn.Module, phase: Phase, context: StepContext, sync_point: SyncPoint
    ) -> Mapping[str, Sample]:
        """As `Samples.samples`: held-out texts that the model goes on with; none where the ids stand for no text."""
        if self.eos_id is None or self.sizes.facts is not None:
            return {}
        was_training = model.training
        with shared_errors(sync_point.topology):
            loader, tokenizer = self.held_out(phase, sync_point.topology), self.tokenizer()
        model.eval()
        try:
            texts = held_out_texts(loader, tokenizer.eos_id, sync_point)
            decoder = NeuromorphicDecoder(_whole(model), self.uses(phase.name), eos_id=tokenizer.eos_id)
            return {NAME: text_samples(decoder, tokenizer, texts, context, sync_point)}
        finally:
            model.train(was_training)

    def ablations(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Mapping[str, Evaluation]:
        """As `Ablates.ablations`: the model as it is, each memory empty, all of them, contents swapped."""
        was_training = model.training
        with shared_errors(sync_point.topology):
            loader = self.held_out(phase, sync_point.topology)
        model.eval()
        try:
            steps, span = self.config.evaluation.steps, self.sizes.span
            return ablations.ablate(model, loader, steps, span, self.uses(phase.name), sync_point)
        finally:
            model.train(was_training)

    def ablation_summary(self, found: Mapping[str, Evaluation]) -> Mapping[str, float]:
        """As `SummarisesAblations.ablation_summary`."""
        return ablations.ablation_summary(found)

    def gradient_squares(self, name: str, gradient: Tensor) -> Mapping[str, Tensor]:
        """As `MeasuresGradients.gradient_squares`."""
        return statistics.gradient_squares(name, gradient)

    def decoder(self, model: nn.Module) -> Decoder:
        """As `Generates.decoder`: each text as one document, with the memories of the phase that the weights are of."""
        return NeuromorphicDecoder(_whole(model), self.uses(self.reached or self.last_phase()))

    @torch.no_grad()
    def lifelong_suite(self, model: nn.Module, phase: Phase, sync_point: SyncPoint, **options: Any) -> Evaluation:
        """As `RemembersFacts.lifelong_suite`."""
        if "documents" in options:
            # In the document that tells the facts they are asked for as well.
            options["documents"] = (0, *options["documents"])
        chosen, was_training = Options(**options), model.training
        probes = self._probes(phase, sync_point)
        model.eval()
        try:
            answers = Lifelong(_whole(model), self.uses(phase.name), probes, chosen, sync_point).run()
        finally:
            model.train(was_training)
        return evaluation_of(answers, probes.domains[0], probes.chance)

    def _probes(self, phase: Phase, sync_point: SyncPoint) -> Probes:
        """Facts as the model was trained on, or sentences in held-out text. Collective."""
        facts, topology = self.sizes.facts, sync_point.topology
        if facts is not None:
            # Of as many as a document may tell: the same number in every stream.
            return TokenFacts(dataclasses.replace(facts, fewest=None), self.config.seed)
        with shared_errors(topology):
            loader, tokenizer = self.held_out(phase, topology), self.tokenizer()
        held_out = _streams(loader, sync_point)
        return TextFacts(tokenizer.encode, tokenizer.eos_id, held_out, self.config.seed)


def _streams(loader: StatefulLoader[TokenBatch], sync_point: SyncPoint) -> list[np.ndarray]:
    """The ids of each held-out stream, from its start."""
    rows: dict[int, list[np.ndarray]] = {}
    for _ in range(HELD_OUT_STEPS):
        for batch in next_step(loader, sync_point, "lifelong"):
            for stream, ids in zip(batch.streams.tolist(), batch.input_ids.numpy(), strict=True):
                rows.setdefault(stream, []).append(ids)
    return [np.concatenate(rows[stream]) for stream in sorted(rows)]


def _whole(model: nn.Module) -> NeuromorphicModel:
    """The model itself, of the engine's module or of itself."""
    found = getattr(model, "module", model)
    assert isinstance(found, NeuromorphicModel)
    return found
