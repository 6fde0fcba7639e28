"""The olmo system: what the engine asks of a decoder that is trained from random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.capabilities import PublishedHours
from pipeline.config import RunConfig
from pipeline.data.batch import Counts, TokenBatch
from pipeline.errors import UserError
from pipeline.host.devices import Device
from pipeline.host.hardware import on_gpu
from pipeline.lm.activations import TrainedDecoder, decoder_bytes
from pipeline.lm.attention import attention_backend
from pipeline.lm.config import AttentionConfig
from pipeline.lm.decoder_config import check_window
from pipeline.lm.decoding import Decoder
from pipeline.lm.dense_decoder import DenseDecoder
from pipeline.lm.exported import plain_decoder
from pipeline.lm.flops import decoder_flops
from pipeline.lm.held_out_files import evaluate_files
from pipeline.lm.perplexity import evaluate_perplexity
from pipeline.lm.system import LanguageModelSystem, is_linear_weight
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Evaluation, Flops, ParameterGroup, Phase, StepContext, StepOutput
from pipeline.systems.olmo import weights
from pipeline.systems.olmo.config import CUTOFF, OlmoConfig
from pipeline.systems.olmo.model import OlmoModel
from pipeline.systems.olmo.native_run import native_run

GUIDE = PublishedHours(
    "A100",
    {
        (10**9, 1): 5.6, (10**9, 8): 0.7, (10**10, 1): 56, (10**10, 8): 7, (10**11, 1): 23 * 24, (10**11, 8): 2.9 * 24,
        (3 * 10**12, 1): 1.9 * 365.25 * 24, (3 * 10**12, 8): 88 * 24,
    },
)  # fmt: skip
"""Of OLMo-1B of February 2024, by the guide to it whose run `olmo_1b` repeats."""
TERM, Z_LOSS = "cross_entropy", "z_loss"


class OlmoSystem(LanguageModelSystem):
    """A decoder on packed text (see pipeline/system.py for what a system is)."""

    name = "olmo"
    decoder_prefix = "backbone."

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.model, OlmoConfig)
        super().__init__(config, config.model.backbone)
        self.sizes = config.model
        if self.sizes.backbone.pretrained is None:
            # The family's own is nobody's choice: no position beyond these is ever seen.
            self.backbone.max_position_embeddings = config.sequence_length
        self.attention = AttentionConfig("full", backend=self.sizes.attention.backend)
        check_window(self.attention, self.backbone, config.sequence_length)

    def describe(self, device_type: str, dtype: torch.dtype) -> dict[str, str]:
        backend = attention_backend(self.attention, self.backbone, device_type, dtype)
        reach = "the document" if self.config.data.document_mask else "the sequence"
        weights = self.sizes.backbone.pretrained or f"random weights ({self.sizes.initialisation})"
        return {
            "backbone": f"{self.backbone.model_type}, {self.backbone.num_hidden_layers} layers of width"
            f" {self.backbone.hidden_size}, {weights}",
            "attention": f"full, of {reach}, backend {backend}",
        }

    def build(self) -> nn.Module:
        return OlmoModel(
            self.sizes,
            self.backbone,
            document_mask=self.config.data.document_mask,
            activation_checkpointing=self.config.activation_checkpointing,
        )

    def decoder_config(self) -> PreTrainedConfig:
        return self.backbone

    def decoder(self, model: nn.Module) -> Decoder:
        assert isinstance(model, OlmoModel)
        return DenseDecoder(self.exported(model))

    def native_config(self, model: Mapping[str, Any], global_batch: int) -> dict[str, Any]:
        return native_run(self.config, model, global_batch, CUTOFF)

    def exported(self, model: nn.Module) -> PreTrainedModel:
        assert isinstance(model, OlmoModel)
        length, pretrained = self.config.sequence_length, self.sizes.backbone.pretrained is not None
        return plain_decoder(model.backbone, trained_length=length, keep_length=pretrained)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, OlmoModel)
        return list(model.backbone.model.layers)

    def check_compile(self, topology: Topology) -> None:
        if topology.sequence > 1:
            raise UserError(
                f"--compile with --parallel.sequence {topology.sequence}: a block that ranks share is no single graph:"
                " leave one of them out"
            )
        if self.config.data.document_mask and not on_gpu():
            raise UserError(
                "--compile with --data.document-mask on a CPU: attention is another graph for every batch of documents:"
                " leave one of them out"
            )

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        return decoder_flops(self.backbone, sequence_length)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> dict[str, int]:
        kept, work = decoder_bytes(
            TrainedDecoder(
                self.backbone,
                self.attention,
                element,
                rows=self.config.batch_size,
                sequence=self.config.sequence_length,
                degree=topology.sequence,
                recompute=self.config.activation_checkpointing,
            )
        )
        return {"kept activations": kept, "working set": work}

    def published_hours(self) -> PublishedHours | None:
        return GUIDE if self.sizes == OlmoConfig() else None

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        weights.initialise(model, self.sizes, self.config.seed, topology)

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        decayed: list[str] = []
        others: list[str] = []
        for name, parameter in model.named_parameters():
            (decayed if self._is_decayed(name, parameter) else others).append(name)
        groups = (
            ParameterGroup("decayed", tuple(decayed), self.sizes.backbone.lr_scale, self.config.weight_decay),
            ParameterGroup("not decayed", tuple(others), self.sizes.backbone.lr_scale),
        )
        return [Phase("train", self.config.steps, tuple(group for group in groups if group.parameters))]

    def _is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        if is_linear_weight(name, parameter):
            return True
        return self.sizes.decay_embeddings if "embed_tokens" in name else self.sizes.decay_norms

    def count(self, batch: TokenBatch) -> Counts:
        labels = {**super().count(batch)}
        return {**labels, Z_LOSS: labels[TERM]} if self.sizes.z_loss else labels

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> StepOutput:
        local = context.topology.shard(batch.input_ids.shape[1])
        output = model(
            batch.input_ids[:, local],
            batch.labels[:, local],
            batch.segment_ids,
            batch.positions,
            context.topology,
            predict=bool(context.options.get("predict", False)),
        )
        per_token = {"losses": output.losses, "predictions": output.predictions}
        tokens = {name: value.detach() for name, value in per_token.items() if value is not None}
        z_losses = {} if output.z_losses is None else {Z_LOSS: output.z_losses.sum()}
        return StepOutput({TERM: output.losses.sum(), **z_losses}, {}, tokens=tokens)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        was_training = model.training
        model.eval()
        try:
            found = evaluate_perplexity(self, model, phase, sync_point, {"held out": {}}, edges={}, ratios={})
        finally:
            model.train(was_training)
        files = evaluate_files(self, model, sync_point)
        return dataclasses.replace(found, scalars={**found.scalars, **files.scalars})
