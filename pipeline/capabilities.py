"""What only some systems can do, each a protocol: a command or an interval asks `isinstance(system, Samples)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.evaluation_result import Table
from pipeline.system import Carry, Evaluation, Phase, Sample, StepContext, StepOutput, System

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from pipeline.data.batch import TokenBatch
    from pipeline.data.tokenizer import Tokenizer
    from pipeline.lm.decoding import Decoder
    from pipeline.lm.memory_folder import MemoryAlone
    from pipeline.parallel.topology import Topology
    from pipeline.runtime.sync import SyncPoint


@runtime_checkable
class Samples(Protocol):
    """Draws from the model during training."""

    def samples(
        self, model: nn.Module, phase: Phase, context: StepContext, sync_point: SyncPoint
    ) -> Mapping[str, Sample]:
        """What was drawn, by the names of its files in OUT/samples; the same on every rank: a function of the weights
        and of the seed, phase and step of `context`.

        Collective; calls `sync_point` at the same places on every rank. Leaves the model's mode as it found it. What
        training carries on is not its to use: the streams stay as they are.
        """
        ...


@runtime_checkable
class CountsEpochs(Protocol):
    """Trains in passes over data of a known size (`--epochs`, and `epoch` in the rows of training)."""

    def steps_per_epoch(self, topology: Topology) -> float:
        """Steps of one pass over the training data, of a system whose `files` are set."""
        ...


@runtime_checkable
class Ablates(Protocol):
    """Evaluates the model with parts of it left out."""

    def ablations(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Mapping[str, Evaluation]:
        """As `System.evaluate`, once for every part that can be left out, by the part's name."""
        ...


@runtime_checkable
class SummarisesAblations(Ablates, Protocol):
    """Compares its ablations in one row of metrics.jsonl."""

    def ablation_summary(self, ablations: Mapping[str, Evaluation]) -> Mapping[str, float]:
        """Numbers of its own of what `ablations` gave."""
        ...


@runtime_checkable
class MeasuresGradients(Protocol):
    """Says of which parts of its parameters the gradients' norms are metrics, at logged steps."""

    def gradient_squares(self, name: str, gradient: Tensor) -> Mapping[str, Tensor]:
        """Sums of squares of the whole gradient of the parameter `name`, by the metrics that they are part of: each is
        the root of the sum over all parameters. They stay on the device."""
        ...


@runtime_checkable
class ClosesGap(Protocol):
    """Has a memory that is compared with full attention, and with itself emptied (`pipeline/lm/gap_closed.py`)."""

    def gap_closed(self, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        """As `System.evaluate`; its scalars are `gap/...`. Raises UserError where there is no gap to close."""
        ...


@runtime_checkable
class Recalls(Protocol):
    """Can be asked for what stood far back (`eval --suite recall`)."""

    def recall_suite(self, model: nn.Module, sync_point: SyncPoint, **options: Any) -> Evaluation:
        """Shares of right answers by length. `options`, each the system's own where it is left out: `lengths` in
        tokens, the least number of `queries` a point, and the `forms` of questions about text. Collective; leaves the
        model's mode as it found it. Raises UserError."""
        ...


@runtime_checkable
class RemembersFacts(Protocol):
    """Has memories that may outlive a document, which are asked for facts of earlier ones (`eval --suite lifelong`)."""

    def lifelong_suite(self, model: nn.Module, phase: Phase, sync_point: SyncPoint, **options: Any) -> Evaluation:
        """Shares of right answers by distance in documents and tokens, after other domains, and without each memory.
        `options`, each the system's own where it is left out: `streams` that are told facts, how many `documents`
        later they are asked for, and `lengths` of documents in tokens. Collective; leaves the model's mode as it found
        it. Raises UserError."""
        ...


@runtime_checkable
class JudgesPeptides(Protocol):
    """Is a model of peptides, whose likelihoods and drawn peptides are measured (`eval --suite peptides`)."""

    def peptide_suite(self, model: nn.Module, phase: Phase, sync_point: SyncPoint, **options: float) -> Evaluation:
        """As `System.evaluate`, with what else there is to measure. `options`, each the system's own where it is left
        out: `samples` that are drawn, held-out `peptides` that are scored, `decoys` beside each true target, and
        `guidance` and `temperature` of what is drawn. Collective; leaves the model's mode as it found it. Raises
        UserError."""
        ...


@runtime_checkable
class MeasuresContexts(Protocol):
    """Has context vectors, whose rank and memory are measured (`eval --suite contexts`)."""

    def check_control(self, checkpoint: Path, other: RunConfig, control: Path) -> None:
        """Raises UserError where `control`, a checkpoint of a run of config `other`, is none of this `checkpoint`."""
        ...

    def context_suite(
        self, model: nn.Module, phase: Phase, sync_point: SyncPoint, control: tuple[System[Any], nn.Module] | None
    ) -> Evaluation:
        """As `System.evaluate`, with what else there is to measure, and the comparison with a control: the system of
        its run, without `files`, and its model, whole. Collective; leaves the mode as it found it. Raises UserError."""
        ...


@runtime_checkable
class ScoresText(Protocol):
    """Is a language model that says how likely each token of a text is: `forward` gives `losses` and `predictions` as
    `pipeline.lm.held_out.Evaluated` has them (`eval --suite downstream`, `--evaluation.tasks`)."""

    config: RunConfig

    def tokenizer(self, makers: Mapping[str, str] | None = None) -> Tokenizer:
        """The one whose ids the model reads. `makers`: what is known of the tokenizers of its token files; None: the
        files say it. Raises UserError where there is none."""
        ...

    def text_limit(self) -> int | None:
        """Tokens of a text that one forward pass reads at most; None: a text of any length is read piece by piece
        through the carry."""
        ...

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Carry, context: StepContext) -> StepOutput:
        """As `System.forward`."""
        ...


@runtime_checkable
class TrainsDecoder(Protocol):
    """Trains one decoder of transformers and nothing besides, so that other programs can take its weights."""

    decoder_prefix: str
    """What stands before transformers' names in those of the model's parameters."""

    def decoder_config(self) -> PreTrainedConfig:
        """What transformers builds the decoder from."""
        ...

    def native_config(self, model: Mapping[str, Any], global_batch: int) -> dict[str, Any]:
        """The config.yaml of an OLMo run that trains as this one does, on `global_batch` sequences a step; `model` is
        what its `model` section says of the decoder."""
        ...


@runtime_checkable
class Generates(Protocol):
    """Is a language model that reads text and goes on with it (`generate CHECKPOINT`)."""

    def decoder(self, model: nn.Module) -> Decoder:
        """Decodes with the model that `build` made and `load_model` filled; whole on this process, not sharded."""
        ...


@dataclass(frozen=True)
class DrawOptions:
    """What a user chooses of samples of every system that draws them."""

    raw_weights: bool = field(default=False, kw_only=True)
    """Draw with the weights of the last update, not with their moving average (--optimizer.ema-decay)."""


@dataclass(frozen=True)
class Drawn:
    """What a model drew."""

    rows: Table
    """A row each."""
    text: str
    """What the command prints of them."""
    said: str
    """One line for a person: how many, how fast, and what is missing."""


@runtime_checkable
class Draws(Protocol):
    """Draws whole samples, which go on from no text (`generate CHECKPOINT`)."""

    def draw_options(self) -> DrawOptions:
        """What a user chooses, at its defaults: a frozen dataclass with a docstring under every field, each the flag of
        its name. To make one raises UserError for a value that no model can use."""
        ...

    def check_draw(self, options: Any) -> None:
        """Raises UserError for options that this system cannot follow, as far as its config tells."""
        ...

    def draw(self, model: nn.Module, options: Any) -> Drawn:
        """Samples of a whole model in evaluation mode, the same for the same options; writes the file that these name,
        if any. Raises UserError."""
        ...


@runtime_checkable
class Exports(Protocol):
    """Can be written as a folder that transformers loads (`export CHECKPOINT DIR`)."""

    def exported(self, model: nn.Module) -> PreTrainedModel:
        """A causal language model of transformers with the parameters of `model` (shared, not copied) and the config
        that `save_pretrained` writes; whole on this process, not sharded."""
        ...


@runtime_checkable
class HasMemory(Protocol):
    """Has a memory beside a backbone, which can be written alone (`export --memory-only`)."""

    def check_memory_alone(self) -> None:
        """Raises UserError where the memory alone is not all that a run trains. Asked before anything is built."""
        ...

    def memory_alone(self, model: nn.Module) -> MemoryAlone:
        """What there is to say of the memory of a whole model, and of the backbone that it belongs to."""
        ...

    def with_memory(self, folder: str) -> System[Any]:
        """The system of the same run with the memory in a folder attached."""
        ...


@runtime_checkable
class Compiles(Protocol):
    """Has blocks that torch.compile makes one graph of, each (`--compile`)."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The blocks that are compiled, of the model that `build` made."""
        ...

    def check_compile(self, topology: Topology) -> None:
        """Raises UserError where a block would not be one graph, or be compiled anew at every step."""
        ...


@runtime_checkable
class CountsParts(Protocol):
    """Says what its parameters are for (`plan RECIPE`)."""

    def parameter_parts(self) -> Mapping[str, int]:
        """Parameters by the part of the model; they add up to all of them."""
        ...


@runtime_checkable
class StatesParameters(Protocol):
    """Follows a published model that builds more or less of itself in other phases (`plan RECIPE`)."""

    def published_parameters(self, phase: Phase) -> int | None:
        """Those that it builds in a phase; None where its sizes are others."""


@dataclass(frozen=True)
class PublishedHours:
    """Training times that others state for a model."""

    device: str
    """The device that they state them for, of the table of devices."""
    hours: Mapping[tuple[int, int], float]
    """By tokens and number of devices."""


@runtime_checkable
class Published(Protocol):
    """Is a model whose training time others have stated (`plan RECIPE --tokens N`)."""

    def published_hours(self) -> PublishedHours | None:
        """None where nobody has for these sizes."""
