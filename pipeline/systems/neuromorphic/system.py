"""The neuromorphic system: what the engine asks of columns with three memories, trained in three phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from pipeline.checkpoint.manifest import pointed
from pipeline.checkpoint.restore import TRAINER_STATE, read_progress
from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, Counts, TokenBatch
from pipeline.errors import UserError
from pipeline.host.devices import Device
from pipeline.lm.held_out_files import evaluate_files, named_files
from pipeline.lm.perplexity import evaluate_perplexity
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Evaluation, Flops, Phase, StepContext, StepOutput, System
from pipeline.systems.neuromorphic import costs
from pipeline.systems.neuromorphic.carry import pack_carry, unpack_carry
from pipeline.systems.neuromorphic.config import PHASES, NeuromorphicConfig
from pipeline.systems.neuromorphic.data import PhaseText
from pipeline.systems.neuromorphic.evaluation.measures import Measures
from pipeline.systems.neuromorphic.evaluation.pictures import panels
from pipeline.systems.neuromorphic.facts import FactsBatch
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.phases import USES, create_phases, run_phases
from pipeline.systems.neuromorphic.state import Uses
from pipeline.systems.neuromorphic.statistics import FACTS_RIGHT, HeldOutShares, right_answers, token_shares
from pipeline.systems.neuromorphic.weights import initialise, parameter_parts, published

TERM, STRENGTHS = "cross_entropy", "strengths"
"""Loss terms: of the labels, and the penalty on strengths near their budget, a mean over streams."""
AS_TRAINED = "as trained"


class NeuromorphicSystem(PhaseText, Measures, System[TokenBatch]):
    """Recurrent columns with working, procedural and episodic memory (see pipeline/system.py for what a system is)."""

    name = "neuromorphic"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.model, NeuromorphicConfig)
        self.sizes = config.model
        self.panels = panels(self.sizes.sizes)

    def check(self, topology: Topology) -> None:
        """Raises UserError for a sequence that is shared, or is no whole number of spans, and for held-out files
        without a name."""
        named_files(self.config)
        if topology.sequence > 1:
            raise UserError(
                f"--parallel.sequence {topology.sequence}: a column reads a token after the one before it: leave it out"
            )
        length, span = self.config.sequence_length, self.sizes.span
        if length % span:
            raise UserError(
                f"--sequence-length {length} is no whole number of spans of {span} tokens (--model.span): give"
                f" {max(span, length - length % span)}"
            )

    def run_phases(self) -> tuple[str, ...]:
        return run_phases(self.config)

    def last_phase(self) -> str:
        return self.config.phase or self.run_phases()[-1]

    def uses(self, phase: str) -> Uses:
        """Of the memories in a phase; outside of all, in the phase that the weights have come to."""
        return USES[phase if phase in PHASES else self.reached or self.last_phase()]

    def settled(self, topology: Topology) -> RunConfig:
        """With the vocabulary of the data. Raises UserError for a run that begins with phase C and has no weights."""
        self._check_beginning()
        return self.with_vocabulary()

    def _check_beginning(self) -> None:
        """Phase C goes on from an episodic memory that has been trained."""
        phases, weights = self.run_phases(), self.config.init_from
        if "C" not in phases or "B" in phases or self.config.resume not in ("auto", "must", "never"):
            return
        given = f"--phases {' '.join(phases)}"
        fix = "name a checkpoint of phase B or C with --init-from, or --resume one that ended B with --phase C"
        if weights is None:
            raise UserError(f"{given}: it goes on from weights with a trained episodic memory: {fix}")
        folder = pointed(weights)
        if (folder / TRAINER_STATE).is_file() and read_progress(folder).phase == "A":
            raise UserError(f"--init-from {weights} is of phase A, which trains no episodic memory: {fix}")

    def build(self) -> nn.Module:
        return NeuromorphicModel(self.sizes)

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        initialise(model, self.config.seed)

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        return create_phases(self.config, model)

    @cached_property
    def eos_id(self) -> int | None:
        return self.end_of_document()

    def count(self, batch: TokenBatch) -> Counts:
        return {TERM: int((batch.labels != IGNORED).sum()), STRENGTHS: batch.rows}

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> StepOutput:
        options = context.options
        before = unpack_carry(carry)
        output = model(
            batch.input_ids, batch.labels, batch.segment_ids, batch.positions, before,
            options.get("uses") or self.uses(context.phase),
            predict=bool(options.get("predict", False)) or ("shares" in options and isinstance(batch, FactsBatch)),
            statistics=context.heavy_metrics,
            checkpointing=self.config.activation_checkpointing and model.training,
        )  # fmt: skip
        if "shares" in options:
            options["shares"].add(token_shares(batch, before, self.eos_id))
            if isinstance(batch, FactsBatch):
                assert output.predictions is not None
                options["shares"].add(right_answers(batch, output.predictions))
        zero = torch.zeros((), device=batch.input_ids.device)
        penalty = self.sizes.strength_penalty * sum(output.penalties.values(), zero)
        tokens = {"losses": output.losses, "predictions": output.predictions}
        return StepOutput(
            {TERM: output.losses.sum(), STRENGTHS: penalty},
            pack_carry(output.state),
            {} if "uses" in options else self.metrics(batch, before, output, context),
            {name: value.detach() for name, value in tokens.items() if value is not None},
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        """Held-out loss, perplexity, bits per byte, and right answers of the facts task, from empty memories, which are
        written as in training."""
        was_training = model.training
        model.eval()
        try:
            edges = {"working memory": float(self.sizes.sizes.window)}
            uses, shares = self.uses(phase.name), HeldOutShares()
            modes = {AS_TRAINED: {"uses": uses, "shares": shares}}
            found = evaluate_perplexity(self, model, phase, sync_point, modes, edges=edges, ratios={})
        finally:
            model.train(was_training)
        files = evaluate_files(self, model, sync_point)
        read = {
            "pm_enabled": float(uses.procedural == "on"),
            "em_enabled": float(uses.episodic == "on"),
            "steps_done": float(self.config.evaluation.steps),
            **shares.means(sync_point.topology),
        }
        return dataclasses.replace(found, scalars={**found.scalars, **read, **files.scalars})

    def headline(self, evaluation: Evaluation) -> str:
        found = evaluation.scalars
        shown = [f"val {found['loss']:.3f}", f"ppl {found['ppl']:.2f}"]
        shown += [f"{found['bpb']:.2f} bpb"] if "bpb" in found else []
        shown += [f"{name.replace('_', ' ')} {found[name]:.1%}" for name in FACTS_RIGHT if name in found]
        shown += [f"{name} {value:.4g}" for name, value in found.items() if name.endswith("/loss")]
        return " | ".join(shown)

    def describe(self, device_type: str, dtype: torch.dtype) -> dict[str, str]:
        sizes, use = self.sizes.sizes, ", ".join
        parts = use(f"{name} {number:,}" for name, number in self.parameter_parts().items())
        return {
            "model": f"tier {self.sizes.tier}, {sizes.columns} columns of {sizes.layers} layers of width"
            f" {sizes.column_width}; parameters: {parts}",
            "memories": f"working memory of {sizes.window} tokens, procedural memory of {sizes.slots} slots a layer,"
            f" episodic memory of {sizes.episodes} episodes a column; written every {self.sizes.span} tokens, credit"
            f" through {self.config.sequence_length} tokens",
            **({"data begins": self.begins} if self.begins else {}),
        }

    def caption(self) -> str:
        return f"tier {self.sizes.tier}" + ", as published" * self.sizes.as_published

    @cached_property
    def _without_storage(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    def parameter_parts(self) -> Mapping[str, int]:
        """Parameters by the part of the model."""
        return parameter_parts(self._without_storage)

    def published_parameters(self, phase: Phase) -> int | None:
        """As `StatesParameters.published_parameters`."""
        return published(self._without_storage, phase.name) if self.sizes.as_published else None

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """As `Compiles.blocks`: the recurrent layers."""
        assert isinstance(model, NeuromorphicModel)
        return list(model.layers)

    def check_compile(self, topology: Topology) -> None:
        """As `Compiles.check_compile`: a layer sees spans of one length, so it is one graph."""

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        return costs.flops(self.sizes, None if phase is None else phase.name)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> Mapping[str, int]:
        config = self.config
        found = costs.activation_bytes(
            self.sizes,
            config.batch_size,
            config.sequence_length,
            element,
            phase="A" if self.last_phase() == "A" else None,
            recompute=config.activation_checkpointing,
        )
        # The streams of all micro-batches, as they were and as they will be.
        return {**found, "state of the streams": 2 * config.grad_accum * found["state of the streams"]}
