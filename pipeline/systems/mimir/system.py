"""The mimir system: what the engine asks of a denoiser of peptides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.capabilities import Drawn
from pipeline.config import EvaluationConfig, RunConfig
from pipeline.data.batch import Counts, StatefulLoader
from pipeline.errors import UserError
from pipeline.host.devices import Device
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Evaluation, Flops, ParameterGroup, Phase, Sample, StepContext, StepOutput, System
from pipeline.systems.mimir import costs, losses, weights
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.data.build import build_loader, list_peptides
from pipeline.systems.mimir.data.loader import PeptideLoader
from pipeline.systems.mimir.diffusion.choice import create_kernel
from pipeline.systems.mimir.evaluation.suite import Options, PeptideSuite
from pipeline.systems.mimir.held_out import floor_of, measure, summary
from pipeline.systems.mimir.losses import CE, LENGTH, UNIT, VB
from pipeline.systems.mimir.model import MimirModel, ModelOutput, TargetSequences
from pipeline.systems.mimir.model.model import parameter_parts
from pipeline.systems.mimir.model.sequences import encode
from pipeline.systems.mimir.peptides import PeptideBatch, PeptideSet
from pipeline.systems.mimir.sampling import draw as drawing
from pipeline.systems.mimir.sampling.options import PeptideOptions
from pipeline.systems.mimir.sampling.sheet import sample_sheet


class MimirSystem(System[PeptideBatch]):
    """Discrete diffusion over peptides (see pipeline/system.py for what a system is)."""

    name = "mimir"
    token_term = VB
    token_weight = 0.0

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.model, MimirConfig)
        self.sizes = config.model
        self.kernel = create_kernel(self.sizes)
        self._held_out: dict[bool, PeptideLoader] = {}

    def check(self, topology: Topology) -> None:
        if topology.sequence > 1:
            raise UserError(
                f"--parallel.sequence {topology.sequence}: peptides are too short to be divided: leave it out"
            )
        if self.config.sequence_length != self.sizes.max_length:
            raise UserError(
                f"--sequence-length {self.config.sequence_length}: peptides have up to --model.max-length"
                f" {self.sizes.max_length} residues: give the same number for both"
            )
        steps, default = self.config.evaluation.steps, EvaluationConfig().steps
        if steps != default:
            raise UserError(
                f"--evaluation.steps {steps}: this system counts the peptides of an evaluation instead: give"
                f" --model.held-out-peptides, and leave --evaluation.steps at {default}"
            )

    def list_data(self, *, ask_servers: bool = False) -> PeptideSet:
        return list_peptides(self.config)

    @property
    def peptides(self) -> PeptideSet:
        """The data, listed by this process where no other has."""
        if self.files is None:
            self.files = self.list_data()
        assert isinstance(self.files, PeptideSet)
        return self.files

    def settled(self, topology: Topology) -> RunConfig:
        if self.sizes.target == "encoder":
            return self.config
        count = self.peptides.training_targets
        names = tuple(self.peptides.target_names[:count])
        model = dataclasses.replace(self.sizes, targets=count, target_names=names)
        return dataclasses.replace(self.config, model=model)

    def steps_per_epoch(self, topology: Topology) -> float:
        """Steps of one pass over the training data; the last one may be filled up."""
        return build_loader(self.config, topology, self.peptides).steps_per_epoch

    def describe(self, device_type: str, dtype: torch.dtype) -> dict[str, str]:
        sizes = self.sizes
        loss = losses.loss_weights(sizes)
        terms = " + ".join(f"{weight:g} {name}" for name, weight in ((CE, loss.ce), (VB, loss.vb)) if weight)
        return {
            "denoiser": f"{sizes.layers} blocks of width {sizes.width}; parameters: "
            + ", ".join(f"{name} {number:,}" for name, number in self.parameter_parts().items()),
            "noise": f"{sizes.kernel}, {sizes.timesteps} timesteps; loss {terms}",
            "lengths": "as often as in the training data" if sizes.length == "empirical" else "of a head",
            **(self._describe_data(self.files) if isinstance(self.files, PeptideSet) else {}),
        }

    def _describe_data(self, data: PeptideSet) -> dict[str, str]:
        least = floor_of(data.training, self.sizes, self.kernel)
        said = {
            "floor": f"cross-entropy {least.ce:.4f}, entropy {least.entropy:.4f} nats per residue, of independent"
            " residues as often as in the training data"
        }
        return said | ({"left out": "; ".join(data.notes)} if data.notes else {})

    def parameter_parts(self) -> Mapping[str, int]:
        """Those of the denoiser with empirical lengths and a table of targets, and what other choices add."""
        return parameter_parts(self.sizes)

    def caption(self) -> str:
        return f"{self.sizes.kernel} noise, {self.sizes.timesteps} timesteps"

    def headline(self, evaluation: Evaluation) -> str:
        found = evaluation.scalars
        if "bound" not in found:
            return super().headline(evaluation)
        bits = found["bits_per_residue"]
        unseen = f" | unseen targets {found['unseen_targets/bound']:.4f}" if "unseen_targets/bound" in found else ""
        return (
            f"val {found['loss']:.4f} | bound {found['bound']:.4f} nats, {bits:.4f} bits per residue"
            f"{unseen} | ce {found['ce']:.4f}, gap to floor {found['gap_to_floor']:+.4f}"
        )

    def build(self) -> nn.Module:
        return MimirModel(self.sizes, activation_checkpointing=self.config.activation_checkpointing)

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        weights.initialise(model, self.config.seed, self.peptides.training)

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        decayed: list[str] = []
        others: list[str] = []
        embeddings = {
            f"{prefix}.weight" for prefix, module in model.named_modules() if isinstance(module, nn.Embedding)
        }
        for name, parameter in model.named_parameters():
            matrix = len(full_shape(parameter)) > 1 and name not in embeddings
            (decayed if matrix else others).append(name)
        groups = (
            ParameterGroup("decayed", tuple(decayed), weight_decay=self.config.weight_decay),
            ParameterGroup("not decayed", tuple(others)),
        )
        return [Phase("train", self.config.steps, groups)]

    def loader(self, phase: Phase, topology: Topology) -> StatefulLoader[PeptideBatch]:
        return build_loader(self.config, topology, self.peptides)

    def held_out(self, phase: Phase, topology: Topology) -> PeptideLoader:
        return self.held_out_loader(topology)

    def held_out_loader(self, topology: Topology, *, targets: bool = False) -> PeptideLoader:
        """Held-out peptides at their start; with `targets`, those of targets that training has nothing of."""
        if targets not in self._held_out:
            self._held_out[targets] = build_loader(self.config, topology, self.peptides, held_out=True, targets=targets)
        self._held_out[targets].reset()
        return self._held_out[targets]

    def count(self, batch: PeptideBatch) -> Counts:
        return losses.count(self.sizes, self.kernel, batch, self.config.seed)

    def forward(self, model: nn.Module, batch: PeptideBatch, carry: Carry, context: StepContext) -> StepOutput:
        kernel, seed = self.kernel, self.config.seed
        t = losses.noise_levels(self.sizes, kernel, batch, seed)
        xt = kernel.corrupt(batch.letters, t, batch.lengths, seed, batch.domain, batch.draws)
        labels, targets = losses.withheld(self.sizes, batch, seed)
        output = self.predict(model, xt, t, batch.lengths, labels, targets)
        terms = kernel.terms(output.logits, batch.letters, xt, t, batch.lengths)
        kept, counts = batch.weights, kernel.counts(t, batch.lengths)
        weight = losses.loss_weights(self.sizes)
        ce = (terms.ce.sum(-1) * kept).sum()
        vb = ((terms.vb + kernel.prior_bound(batch.letters, batch.lengths)).sum(-1) * kept).sum()
        # A term of weight 0 may be infinite.
        sums = {
            CE: ce * (UNIT * weight.ce) if weight.ce else torch.zeros_like(ce),
            VB: vb * weight.vb if weight.vb else torch.zeros_like(vb),
        }
        metrics = {CE: (ce, (counts.ce * kept).sum()), VB: (vb, (counts.vb * kept).sum())}
        if self.sizes.length == "head":
            nats = -output.log_lengths.gather(-1, batch.lengths[:, None])[:, 0]
            sums[LENGTH] = (nats * kept).sum()
        return StepOutput(sums, {}, {name: (value.detach(), number) for name, (value, number) in metrics.items()})

    def predict(
        self,
        model: nn.Module,
        states: Tensor,
        t: Tensor,
        lengths: Tensor,
        labels: Tensor,
        targets: Tensor,
        sequences: TargetSequences | None = None,
    ) -> ModelOutput:
        """What the model says of noisy peptides: states [rows, L], t, lengths, labels and targets [rows], as
        `MimirModel` and `PeptideBatch` have them. `sequences`: of targets that the data need not have; None: those of
        `targets`."""
        if sequences is None and self.sizes.target == "encoder":
            sequences = self.target_sequences(targets)
        return model(states, self.kernel.level(t), lengths, labels, targets, sequences)

    def target_sequences(self, targets: Tensor) -> TargetSequences:
        """The sequences of the targets [rows] of a micro-batch, each of them once, and one at least."""
        known, rows = torch.unique(targets.clamp(min=0), return_inverse=True)
        ids = torch.from_numpy(self._encoded[known.cpu().numpy()].astype(np.int64))
        width = int((ids > 0).sum(-1).amax().clamp(min=1))
        return TargetSequences(ids[:, :width].to(targets.device), torch.where(targets < 0, -1, rows))

    @cached_property
    def _encoded(self) -> np.ndarray:
        """The ids of all targets' sequences [targets, T] uint8, one of no residue where there is no target."""
        sequences = self.peptides.target_sequences
        if sequences is None:
            raise UserError("--model.target encoder reads the targets' amino acids: name them with --model.target-file")
        return encode(list(sequences) or [""], self.sizes.encoder.longest)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        """loss, ce and bound of held-out clusters, given the length; with an encoder, the bound of unseen targets.

        Where training draws both labels equally often, both weigh alike in all of them: the set itself may be nearly
        all background, whose bound says little of what interacts.
        """
        topology, was_training = sync_point.topology, model.training
        model.eval()
        try:
            found = self._measure(model, sync_point, targets=False)
            unseen = self.sizes.target == "encoder" and len(self.peptides.held_out_targets) > 0
            other = self._measure(model, sync_point, targets=True) if unseen else {}
        finally:
            model.train(was_training)
        with shared_errors(topology):
            scalars = summary(found, self.sizes, self.kernel, self.held_out_loader(topology).peptides)
        if other:
            scalars["unseen_targets/bound"] = other["bound"]
        return Evaluation(scalars)

    def _measure(self, model: nn.Module, sync_point: SyncPoint, *, targets: bool) -> dict[str, float]:
        with shared_errors(sync_point.topology):
            loader = self.held_out_loader(sync_point.topology, targets=targets)
        return measure(
            self._predict_batch, model, self.kernel, loader, loader.steps_per_epoch, sync_point, self.sizes.balanced
        )

    def _predict_batch(self, model: nn.Module, batch: PeptideBatch, xt: Tensor, t: Tensor) -> ModelOutput:
        return self.predict(model, xt, t, batch.lengths, batch.labels, batch.targets)

    def samples(
        self, model: nn.Module, phase: Phase, context: StepContext, sync_point: SyncPoint
    ) -> Mapping[str, Sample]:
        return {"peptides": sample_sheet(self, model, context.seed, sync_point)}

    def draw_options(self) -> PeptideOptions:
        return PeptideOptions()

    def check_draw(self, options: PeptideOptions) -> None:
        drawing.check(self, options)

    def draw(self, model: nn.Module, options: PeptideOptions) -> Drawn:
        return drawing.draw(self, model, options)

    def peptide_suite(self, model: nn.Module, phase: Phase, sync_point: SyncPoint, **options: Any) -> Evaluation:
        own, was_training = self.evaluate(model, phase, sync_point), model.training
        model.eval()
        try:
            found = PeptideSuite(self, model, sync_point, Options(**options)).run()
        finally:
            model.train(was_training)
        return dataclasses.replace(found, scalars=own.scalars)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, MimirModel)
        return list(model.blocks)

    def check_compile(self, topology: Topology) -> None:
        """A block is one graph on every layout."""

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        return costs.denoiser_flops(self.sizes, sequence_length)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> dict[str, int]:
        return costs.step_bytes(
            self.sizes, self.config.batch_size, element, recompute=self.config.activation_checkpointing
        )
