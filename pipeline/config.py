"""RunConfig and its sections: everything that decides a run, as frozen dataclasses.

A recipe is a function that returns a `RunConfig`; `tyro` makes flags of the fields and help of their docstrings.
Nothing here touches a device, a file or a process group.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.data_config import DataConfig
from pipeline.errors import UserError, shown
from pipeline.evaluation_config import EvaluationConfig
from pipeline.model_config import ModelConfig
from pipeline.units import LARGEST

AUTO_ID = "auto"
"""The `run_id` that stands for the time of the start."""
IN_EPOCHS = {"train": "steps", "save": "save_every", "evaluate": "eval_every", "sample": "sample_every"}
"""Fields of EpochsConfig, and the field of RunConfig that each decides."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are laid out: data degree x sequence degree = ranks."""

    sequence: int = 1
    """Ulysses degree: how many ranks share a sequence. It divides ranks, sequence length and all head counts."""
    timeout_minutes: float = 30.0
    """How long a collective may wait for a rank before the job ends instead of hanging."""
    start_minutes: float = 5.0
    """How long the ranks wait for each other to appear at the start. Raise it where nodes are started one by one."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up, over `steps`."""
    min_lr_ratio: float = 0.1
    """A cosine or linear schedule ends at this share of the peak learning rate."""
    min_lr: Annotated[float | None, tyro.conf.arg(aliases=["--lr-min"])] = None
    """The learning rate at which it ends, in place of that share."""
    warmup_start: float = 0.0
    """Share of the peak learning rate from which the warm-up rises."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which evaluations, samples and what is made of a
    checkpoint take in the place of the weights; 0: none."""
    max_skipped: int = 20
    """Updates with a non-finite loss or gradient that may be skipped in a row before the run stops."""


@dataclass(frozen=True)
class ReportConfig:
    """What a person sees."""

    log_every: Annotated[int, tyro.conf.arg(aliases=["--log-interval"])] = 1
    """Steps between `train` rows of metrics.jsonl and plain progress lines."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Show what else is known: every logged step as a line on a terminal too, with all metrics of the system, and what
    is drawn from the model."""
    progress_line: bool = False
    """Log a line `Progress: 10,000/100,000 (10.0%) | Speed: 1200 tok/s | ETA: 75s` with each of these too: of the
    tokens of the pass over the data that it is in, or of the phase, of a system that counts no passes."""
    plots: Annotated[bool, tyro.conf.arg(aliases=["--plots"])] = True
    """Draw PNG plots at evaluations and at the end."""
    plot_every: Annotated[int, tyro.conf.arg(aliases=["--plot-interval"])] = 0
    """Steps between drawings of the training curves, which are also drawn at the end; 0: at every evaluation."""
    spike_factor: float = 4.0
    """A step whose gradient norm is above this multiple of the running median is logged with its batch; 0: none is."""
    tensorboard: bool = False
    """Write TensorBoard events under OUT/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs the `wandb` extra)."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s at the training precision, for MFU on a device the table does not know."""


@dataclass(frozen=True)
class EpochsConfig:
    """Lengths in passes over the training data, of a system that counts them. 0: the flag in steps holds."""

    train: Annotated[float, tyro.conf.arg(aliases=["--epochs", "--phase2-epochs"])] = 0.0
    """Passes in the whole schedule, in place of --steps."""
    save: float = 0.0
    """Passes between checkpoints, in place of --save-every."""
    evaluate: float = 0.0
    """Passes between held-out evaluations, in place of --eval-every."""
    sample: float = 0.0
    """Passes between samples, in place of --sample-every."""


@dataclass(frozen=True)
class RunConfig:
    """One run. Flags are the field names: `--steps 100 --parallel.sequence 2`."""

    recipe: tyro.conf.Suppress[str]
    """Name of the recipe that made this config."""
    model: ModelConfig
    """The system and its sizes."""
    steps: Annotated[int, tyro.conf.arg(aliases=["--max-steps", "--max-steps-override", "--max-duration"])]
    """Optimizer updates in the whole schedule, or in each phase that has no number of its own where there are several;
    steps are counted from 1. 0, where there is one phase: the model is evaluated and saved as it begins. --max-duration
    also takes tokens (4e12T); beside --steps, or a stop of the recipe's or file's own, it is --stop-after."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--bs", "--device-train-microbatch-size"])]
    """Sequences per data rank and micro-batch."""
    sequence_length: Annotated[int, tyro.conf.arg(aliases=["--max-seq-length"])]
    """Tokens per sequence, over all ranks that share it."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--phase2-learning-rate"])]
    """Peak learning rate, of phases that have none of their own."""
    grad_accum: int = 1
    """Micro-batches per step."""
    global_batch_size: Annotated[int | None, tyro.conf.arg(aliases=["--global-train-batch-size"])] = None
    """Sequences per step over all ranks: --grad-accum is then what makes them of --batch-size on each data rank. None:
    as many as --batch-size and --grad-accum give."""
    global_batch_tokens: int | None = None
    """--global-batch-size in tokens: a multiple of --sequence-length."""
    phases: tuple[str, ...] = ()
    """Phases that the run is made of, in their order, of a system with several; none: all."""
    phase: str | None = None
    """Run this phase alone: from the checkpoint that ended the one before it, or from one inside it."""
    stop_after: int | None = None
    """Stop (and save) after this step, leaving the schedule as it is."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    output_dir: Path = Path("outputs")
    """Run directory."""
    run_name: str | None = None
    """Name of the run, in place of --output-dir: the run directory is outputs/NAME."""
    output_root: Path | None = None
    """Folder of the runs in place of outputs: the run directory is in it, by the name of the run or the recipe."""
    run_id: str | None = None
    """A folder of this name below the run's: `auto` names it by date and time, so that every start has a new one."""
    resume: Annotated[str, tyro.conf.arg(aliases=["--resume-from"])] = "auto"
    """auto: from the newest complete checkpoint of the run directory if there is one; must: fail without one;
    never: start afresh; or the path of a checkpoint."""
    init_from: Path | None = None
    """Checkpoint to take weights alone from."""
    save_every: Annotated[int, tyro.conf.arg(aliases=["--save-interval"])] = 500
    """Steps between checkpoints; 0: at the end only."""
    save_at_start: bool = False
    """Save a checkpoint before the first step too: checkpoint-0, with the initial weights, which is kept."""
    keep: int = 2
    """Complete checkpoints to keep: the newest. Those that ended a phase stay besides, once the next one has begun."""
    keep_every: int = 0
    """Beside the newest, keep the checkpoints whose step is a multiple of this; 0: none."""
    async_save: bool = False
    """Copy what a checkpoint holds to host memory and write it while training goes on; the last one is waited for."""
    max_hours: float | None = None
    """Stop and save when this start has run so many hours: a job's time limit, less the time that a save takes."""
    eval_every: Annotated[int, tyro.conf.arg(aliases=["--eval-interval", "--val-interval"])] = 500
    """Steps between held-out evaluations; 0: at the end only."""
    sample_every: Annotated[int, tyro.conf.arg(aliases=["--sample-interval", "--text-sample-interval"])] = 0
    """Steps between samples, of a system that draws from its model; 0: at the end only."""
    ablate_every: Annotated[int, tyro.conf.arg(aliases=["--ablate-interval"])] = 0
    """Steps between ablations, of a system that leaves parts of its model out; 0: at the end only."""
    warmup_steps: Annotated[int, tyro.conf.arg(aliases=["--scheduler.t-warmup"])] = 0
    """Steps over which the learning rate rises linearly, from --optimizer.warmup-start of the peak."""
    weight_decay: float = 0.0
    """AdamW decay of matrices; vectors, norms and gates are never decayed."""
    clip: Annotated[float, tyro.conf.arg(aliases=["--gradient-clip"])] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    zero: str = "zero0"
    """DeepSpeed configuration: a name in ds_configs/ or the path of a JSON file."""
    precision: Literal["auto", "auto-amx", "fp32", "bf16", "fp16"] = "auto"
    """Of the model's computation; master weights are fp32. auto: bf16 on a GPU that has it, fp16 with a dynamic loss
    scale on an older one, fp32 on a CPU. auto-amx: the same, but bf16 on a CPU with AMX (for widths from 512 on)."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Compile the blocks of the model with torch.compile, each as a single graph, when they are first trained: up to a
    minute of the first step. Evaluations run them as they are. Not with ZeRO-3."""
    profile: int = 0
    """Record this many steps (after two of warm-up) with torch.profiler into OUT/profile."""
    dry_run: bool = False
    """Build everything, run one step without an update, and stop: nothing is saved."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: EpochsConfig = field(default_factory=EpochsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        positive = {
            "--batch-size": self.batch_size,
            "--sequence-length": self.sequence_length,
            "--grad-accum": self.grad_accum,
            "--lr": self.lr,
            "--parallel.sequence": self.parallel.sequence,
            "--keep": self.keep,
            "--report.log-every": self.report.log_every,
            "--evaluation.steps": self.evaluation.steps,
            "--parallel.timeout-minutes": self.parallel.timeout_minutes,
            "--parallel.start-minutes": self.parallel.start_minutes,
            "--optimizer.max-skipped": self.optimizer.max_skipped,
        }
        if self.global_batch_size is not None:
            positive["--global-batch-size"] = self.global_batch_size
        if self.global_batch_tokens is not None:
            positive["--global-batch-tokens"] = self.global_batch_tokens
        if self.max_hours is not None:
            positive["--max-hours"] = self.max_hours
        if self.report.peak_tflops is not None:
            positive["--report.peak-tflops"] = self.report.peak_tflops
        for flag, value in positive.items():
            if not 0 < value < math.inf:
                raise UserError(f"{flag} is {value}: give a value above 0")
        at_least_zero = {
            "--steps": self.steps,
            "--save-every": self.save_every,
            "--keep-every": self.keep_every,
            "--eval-every": self.eval_every,
            "--sample-every": self.sample_every,
            "--ablate-every": self.ablate_every,
            "--warmup-steps": self.warmup_steps,
            "--weight-decay": self.weight_decay,
            "--clip": self.clip,
            "--profile": self.profile,
            "--data.min-tokens": self.data.min_tokens,
            "--optimizer.eps": self.optimizer.eps,
            "--report.plot-every": self.report.plot_every,
            "--report.spike-factor": self.report.spike_factor,
            "--evaluation.batch-size": self.evaluation.batch_size,
            "--evaluation.gap-every": self.evaluation.gap_every,
            "--evaluation.full-length": self.evaluation.full_length,
            "--evaluation.tasks-every": self.evaluation.tasks_every,
            "--evaluation.task-limit": self.evaluation.task_limit,
            "--evaluation.patience": self.evaluation.patience,
            **{f"--epochs.{name}": getattr(self.epochs, name) for name in IN_EPOCHS},
        }
        for flag, value in at_least_zero.items():
            if not 0 <= value < math.inf:
                raise UserError(f"{flag} is {value}: give 0 or more")
        for flag, value in {**positive, **at_least_zero}.items():
            if isinstance(value, int) and value > LARGEST:
                raise UserError(f"{flag} is {shown(value)}: give at most {LARGEST}")
        for flag, name in {"--run-name": self.run_name, "--run-id": self.run_id}.items():
            if name is not None and (name in ("", ".", "..") or "/" in name):
                raise UserError(f"{flag} is {shown(name)}: give the name of one folder, without /")
        if self.run_id == AUTO_ID and self.resume == "must":
            raise UserError("--resume must goes on with a run, and --run-id auto begins one: give the run's --run-id")
        if self.stop_after is not None and self.stop_after < 1:
            raise UserError(f"--stop-after is {self.stop_after}: give a step from 1 on")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise UserError(f"--optimizer.betas are {self.optimizer.betas}: give two values from 0 to below 1")
        if not 0 <= self.optimizer.ema_decay < 1:
            raise UserError(f"--optimizer.ema-decay is {self.optimizer.ema_decay}: give a value from 0 to below 1")
        if not 0 <= self.optimizer.min_lr_ratio <= 1:
            raise UserError(f"--optimizer.min-lr-ratio is {self.optimizer.min_lr_ratio}: give a share from 0 to 1")
        if self.optimizer.min_lr is not None and not 0 <= self.optimizer.min_lr <= self.lr:
            raise UserError(f"--optimizer.min-lr is {self.optimizer.min_lr}: give a rate from 0 to --lr, {self.lr}")
        if not 0 <= self.optimizer.warmup_start <= 1:
            raise UserError(f"--optimizer.warmup-start is {self.optimizer.warmup_start}: give a share from 0 to 1")
        if not 0 < self.data.holdout < 1:
            raise UserError(f"--data.holdout is {self.data.holdout}: give a share between 0 and 1")
        if self.data.path and self.data.dataset:
            raise UserError("--data.path and --data.dataset are both given: name one source")
        if self.sequence_length % self.parallel.sequence:
            raise UserError(
                f"--sequence-length {self.sequence_length} is not divisible by --parallel.sequence"
                f" {self.parallel.sequence}: choose a multiple"
            )


def replace(config: RunConfig, **changes: object) -> RunConfig:
    """`dataclasses.replace` with section fields spelled `section__field`, for short variants of recipes."""
    plain: dict[str, object] = {}
    sections: dict[str, dict[str, object]] = {}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            sections.setdefault(section, {})[key] = value
        else:
            plain[name] = value
    for section, values in sections.items():
        plain[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **plain)  # type: ignore[arg-type]
