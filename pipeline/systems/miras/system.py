"""The miras system: what the engine asks of a decoder with memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import Counts, TokenBatch
from pipeline.errors import UserError
from pipeline.host.devices import Device
from pipeline.lm.attention import attention_backend
from pipeline.lm.backbone import norms_and_ffns
from pipeline.lm.decoder_config import check_window, kv_heads, sliding_window
from pipeline.lm.decoding import Decoder
from pipeline.lm.distillation import choose, comparable, count_compared
from pipeline.lm.memory_folder import MemoryAlone
from pipeline.lm.pretrained import trained_length
from pipeline.lm.system import LanguageModelSystem, is_linear_weight
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Evaluation, Flops, ParameterGroup, Phase, StepContext, StepOutput, System
from pipeline.systems.miras import descriptions, weights
from pipeline.systems.miras.attach import attach, memory_alone
from pipeline.systems.miras.attachments import attachment_backend, check_attachment
from pipeline.systems.miras.carry import pack_carry, unpack_carry
from pipeline.systems.miras.config import LIKE_ATTENTION, MirasConfig
from pipeline.systems.miras.layer_kinds import check_chunks, kinds_of_memory, on_backbone
from pipeline.systems.miras.memory import MemoryHealth, health_metrics
from pipeline.systems.miras.model import MirasModel, ModelOutput
from pipeline.systems.miras.slots import SlotHealth, importance_surrogate, slot_metrics
from pipeline.systems.miras.teacher import check_distillation, term_weights

if TYPE_CHECKING:
    from pipeline.systems.miras.causal_lm import MnemosForCausalLM

TERM, WRITE = "cross_entropy", "write"
"""Loss terms: of the labels, and the penalty on writing."""


class MirasSystem(LanguageModelSystem):
    """A decoder with MIRAS neural long-term memory (see pipeline/system.py for what a system is)."""

    name = "miras"

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.model, MirasConfig)
        super().__init__(config, config.model.backbone)
        self.sizes = on_backbone(config.model, self.backbone)
        self.kinds = kinds_of_memory(self.sizes.memory, self.backbone)
        for kind in self.kinds:
            check_attachment(kind, self.backbone, self.sizes.attention, trained_length(self.sizes.backbone))
        check_window(self.sizes.attention, self.backbone, config.sequence_length)
        self.trained_length = self._trained_length()
        if self.sizes.distil == "full":
            self.token_weight = self.sizes.distillation.cross_entropy

    def _trained_length(self) -> int | None:
        """Tokens that the backbone was trained to see, as far as a teacher asks. Raises UserError where it then has
        nothing to say."""
        found = None
        if self.sizes.distil == "full":
            limits = (trained_length(self.sizes.backbone), sliding_window(self.backbone))
            found = min((limit for limit in limits if limit is not None), default=None)
        check_distillation(self.sizes, self.config.sequence_length, found)
        return found

    def check(self, topology: Topology) -> None:
        """Raises UserError when heads or sequence cannot be divided over the ranks, nothing would be trained, or local
        weights are not whole."""
        if not self.sizes.memory.layers and not self.sizes.backbone.trainable:
            raise UserError("nothing is trained: name --model.memory.layers, or give --model.backbone.trainable")
        check_chunks(self.kinds, self.config.sequence_length)
        if self.config.evaluation.gap_every:
            from pipeline.systems.miras.evaluation import check_gap

            check_gap(self, topology)
        super().check(topology)

    def divided(self) -> dict[str, int]:
        counts = super().divided()
        for kind in self.kinds:
            # The others' are attention's.
            if kind.attachment not in LIKE_ATTENTION:
                counts["memory heads"] = kind.heads
        return counts

    def describe(self, device_type: str, dtype: torch.dtype) -> dict[str, str]:
        attention = self.sizes.attention
        reach = "the sequence" if attention.kind == "full" else f"{attention.window} tokens and {attention.sinks} sinks"
        backend = attention_backend(attention, self.backbone, device_type, dtype)
        backends = [attachment_backend(kind, backend, device_type, dtype) for kind in self.kinds]
        found = {
            "backbone": f"{self.backbone.model_type}, {self.backbone.num_hidden_layers} layers of width"
            f" {self.backbone.hidden_size},"
            f" {'trained' if self.sizes.backbone.trainable else 'frozen'},"
            f" {self.sizes.backbone.pretrained or 'random weights'}",
            "attention": f"{attention.kind} of {reach}, backend {backend}",
            "memory": descriptions.memory_line(self.kinds, backends),
        }
        if self.sizes.distil == "full":
            length = self.config.sequence_length
            found["distillation"] = descriptions.distillation_line(self.sizes, length, self.trained_length)
        return found

    def caption(self) -> str:
        return descriptions.caption(self.sizes)

    def headline(self, evaluation: Evaluation) -> str:
        return descriptions.headline(evaluation.scalars)

    def health(self, metrics: Mapping[str, float]) -> str:
        return descriptions.health(metrics)

    def text_limit(self) -> int | None:
        return None if self.sizes.attention.kind == "window" else super().text_limit()

    def build(self) -> nn.Module:
        return MirasModel(self.sizes, self.backbone, activation_checkpointing=self.config.activation_checkpointing)

    def initialise(self, model: nn.Module, topology: Topology) -> None:
        for kind in self.kinds:
            weights.check_gathering(model, kind, topology)
        weights.initialise(model, self.sizes, self.config.seed, topology)
        if self.sizes.memory.pretrained is not None:
            attach(model, self.sizes, topology, self.replaced)
        # The config of a name on a hub may have come with the weights.
        self.trained_length = self._trained_length()

    def check_memory_alone(self) -> None:
        if self.sizes.backbone.trainable:
            raise UserError(
                f"--memory-only: {self.config.recipe} trained its backbone too, and the memory is nothing without it:"
                " leave it out"
            )
        if not self.kinds:
            raise UserError(f"--memory-only: {self.config.recipe} has no memory on any layer: leave it out")

    def memory_alone(self, model: nn.Module) -> MemoryAlone:
        return memory_alone(model, self.sizes, Topology())

    def with_memory(self, folder: str) -> System[TokenBatch]:
        assert isinstance(self.config.model, MirasConfig)
        memory = dataclasses.replace(self.config.model.memory, pretrained=folder)
        model = dataclasses.replace(self.config.model, memory=memory)
        return MirasSystem(dataclasses.replace(self.config, model=model))

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        groups: dict[tuple[str, bool], list[str]] = {}
        for name, parameter in model.named_parameters():
            part = name.partition(".")[0]
            if part == "backbone" and not self.sizes.backbone.trainable:
                continue
            # Gates decide how long a memory lasts: decay would pull them to one half of their range.
            gate = any(word in name for word in ("alpha_proj", "beta_proj", "share_proj", "shift_proj"))
            matrix = is_linear_weight(name, parameter) and not gate
            groups.setdefault((part, matrix), []).append(name)
        return [
            Phase(
                "train",
                self.config.steps,
                tuple(
                    ParameterGroup(
                        f"{part}_{'matrices' if matrix else 'vectors'}",
                        tuple(names),
                        self.sizes.backbone.lr_scale if part == "backbone" else 1.0,
                        self.config.weight_decay if matrix else 0.0,
                    )
                    for (part, matrix), names in groups.items()
                ),
            )
        ]

    def count(self, batch: TokenBatch) -> Counts:
        counts = {**super().count(batch)}
        if self.sizes.distil == "full":
            compared = count_compared(self._comparable(batch), self.sizes.distillation.tokens)
            counts |= dict.fromkeys(term_weights(self.sizes.distillation), compared)
        if self.penalised:
            counts[WRITE] = batch.input_ids.numel()
        return counts

    @property
    def penalised(self) -> bool:
        """Whether there is a penalty on writing."""
        return any(kind.attachment != "slots" for kind in self.kinds) and self.sizes.memory.write_penalty > 0

    def _comparable(self, batch: TokenBatch) -> Tensor:
        """The tokens at which the teacher can say something that the window does not, [rows, T] bool."""
        return comparable(batch.segment_ids, self.sizes.attention.window, self.trained_length)

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> StepOutput:
        local = context.topology.shard(batch.input_ids.shape[1])
        compared = None
        if self.sizes.distil == "full":
            compared = choose(
                self._comparable(batch), self.sizes.distillation.tokens,
                seed=context.seed, step=context.step, streams=batch.streams,
            )  # fmt: skip
        output = model(
            batch.input_ids[:, local],
            batch.labels[:, local],
            batch.segment_ids,
            batch.positions,
            unpack_carry(carry, self.backbone.num_hidden_layers),
            context.topology,
            use_memory=bool(context.options.get("memory", True)),
            emptied=bool(context.options.get("emptied", False)),
            attention=context.options.get("attention"),
            predict=bool(context.options.get("predict", False)),
            compared=compared,
        )
        metrics = health_metrics([state for state in output.health if isinstance(state, MemoryHealth)])
        metrics |= slot_metrics([state for state in output.health if isinstance(state, SlotHealth)])
        if self.sizes.attention.kind == "window":
            reach = batch.positions[:, local] >= self.sizes.attention.window
            metrics["beyond_window"] = (reach.sum(), reach.new_full((), reach.numel(), dtype=torch.float64))
        per_token = {"losses": output.losses, "predictions": output.predictions}
        tokens = {name: value.detach() for name, value in per_token.items() if value is not None}
        return StepOutput(self._sums(output), pack_carry(output.carry), metrics, tokens)

    def _sums(self, output: ModelOutput) -> dict[str, Tensor]:
        """This rank's sum per loss term, times the term's weight."""
        penalty = {}
        if self.penalised and output.health:
            opened = torch.stack([state.opened for state in output.health if isinstance(state, MemoryHealth)]).mean()
            penalty[WRITE] = self.sizes.memory.write_penalty * opened
        beside = importance_surrogate(output.health, kv_heads(self.backbone))
        if output.distilled is None:
            assert output.losses is not None
            return {TERM: output.losses.sum() + beside, **penalty}
        weights = term_weights(self.sizes.distillation)
        found = {term: weights[term] * value for term, value in output.distilled.items()}
        # Of weight 0 there is no sum, and the term stays: its counts are the tokens.
        zero = torch.zeros((), device=next(iter(found.values())).device)
        own = self.sizes.distillation.cross_entropy
        return {TERM: beside + (zero if output.losses is None else own * output.losses.sum()), **found, **penalty}

    def evaluate(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        from pipeline.systems.miras.evaluation import evaluate

        return evaluate(self, model, phase, sync_point)

    def gap_closed(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        from pipeline.systems.miras.evaluation import gap_closed

        return gap_closed(self, model, phase, sync_point)

    def recall_suite(self, model: nn.Module, sync_point: SyncPoint, **options: Any) -> Evaluation:
        from pipeline.systems.miras.evaluation import recall_suite

        return recall_suite(self, model, sync_point, **options)

    def decoder(self, model: nn.Module) -> Decoder:
        return self.exported(model).decoder()

    def exported(self, model: nn.Module) -> MnemosForCausalLM:
        from pipeline.systems.miras.causal_lm import causal_lm_of

        assert isinstance(model, MirasModel)
        limit = None
        if self.sizes.attention.kind == "full":
            own = self.backbone.max_position_embeddings if self.sizes.backbone.pretrained is not None else 0
            limit = max(own, self.config.sequence_length)
        return causal_lm_of(model, limit=limit)

    def flops(self, sequence_length: int, phase: Phase | None = None) -> Flops:
        from pipeline.systems.miras.flops import count_flops

        return count_flops(self.sizes, self.backbone, sequence_length)

    def activation_bytes(self, topology: Topology, element: int, device: Device) -> dict[str, int]:
        from pipeline.systems.miras.activations import run_bytes

        return run_bytes(self.config, self.sizes, self.backbone, topology, element, device)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """As `Compiles.blocks`. A whole layer is no single graph: its attention and memory go by a plan of the step."""
        assert isinstance(model, MirasModel)
        return norms_and_ffns(model.backbone)

    def check_compile(self, topology: Topology) -> None:
        """As `Compiles.check_compile`: they are one graph on every layout."""
