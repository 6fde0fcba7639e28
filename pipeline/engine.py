"""DeepSpeed: start the ranks, build a sharded model, and initialise, backward, step."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# First: it decides the accelerator that DeepSpeed picks when it is imported.
import pipeline.parallel  # noqa: F401

# isort: split
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import logger as deepspeed_logger

from pipeline.checkpoint.shards import ShardFiles
from pipeline.checkpoint.universal_convert import Shards
from pipeline.config import RunConfig
from pipeline.ds_config import check_accepted, check_settings, offload_device
from pipeline.errors import RankError, UserError, brief, shown
from pipeline.files.json_file import read_json
from pipeline.host.hardware import on_gpu
from pipeline.host.local import Machine
from pipeline.host.package import config_folder
from pipeline.parallel.topology import Topology, create_topology, limit_waits
from pipeline.parallel.weights import full_shape
from pipeline.runtime.rendezvous import join
from pipeline.system import Phase

AFTER_THE_WATCH = datetime.timedelta(seconds=30)
FLATTENED = ("bit16_groups", "bf16_groups", "fp16_groups")
"""Where DeepSpeed's optimizers (stages 1 and 2, bfloat16 beside them, stage 3 and none) hold parameters in the order of
their shards."""
SAVE_EVENTS = ("_optimizer_has_ckpt_event_prologue", "_optimizer_has_ckpt_event_epilogue")
CONFIG_FOLDER = config_folder()


def start(config: RunConfig) -> Topology:
    """Joins the process group (one of a single rank without a launcher) and lays out the ranks."""
    if "RANK" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(name) or 1) > 1:
                raise UserError(
                    f"{name} is {os.environ[name]}, but RANK is not set: start the ranks with launch.sh or torchrun"
                    " (docs/multi_node.md)"
                )
        port = Machine(os.environ).free_port()
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu():
        if local_rank >= torch.cuda.device_count():
            raise RankError(
                f"rank {os.environ['RANK']}: no GPU {local_rank} here (there are {torch.cuda.device_count()}):"
                " start fewer ranks"
            )
        get_accelerator().set_device(local_rank)
    deepspeed_logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that newer torch releases rename: not the user's doing.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    if not on_gpu():
        # DeepSpeed would compile an operation that only its inference uses, and stop where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = _patience(config)
    if not dist.is_initialized():
        backend = get_accelerator().communication_backend_name() if on_gpu() else "gloo"
        join(backend, timeout, datetime.timedelta(minutes=config.parallel.start_minutes))
    # torchrun and DeepSpeed's launcher name the ranks of a node differently.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    return create_topology(
        config.parallel.sequence,
        local_rank=local_rank,
        nodes=max(1, dist.get_world_size() // local),
        timeout=timeout,
    )


def _patience(config: RunConfig) -> datetime.timedelta:
    # The watch speaks first and names the rank; a collective that gives up only knows that it waited.
    return datetime.timedelta(minutes=config.parallel.timeout_minutes) + AFTER_THE_WATCH


def stop() -> None:
    """Leaves the process group; gloo's threads abort the interpreter when it ends without this."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(topology: Topology) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", topology.local_rank) if on_gpu() else torch.device("cpu")


def precision_of(config: RunConfig) -> torch.dtype:
    """The dtype that the model computes in; master weights and optimizer state are float32 in any case."""
    if config.precision == "auto":
        return torch.bfloat16 if on_gpu() else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def config_path(name: str) -> Path:
    """The file that `--zero NAME` means."""
    path = Path(name) if name.endswith(".json") else CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.json")))
        raise UserError(f"--zero {name}: no such DeepSpeed configuration; known: {known}, or the path of a JSON file")
    return path


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the named file with every "auto" decided. Raises UserError."""
    path = config_path(config.zero)
    resolved = read_json(path, "correct the file")
    check_settings(path, resolved)
    decided = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "gradient_clipping": config.clip,
    }
    for key, value in decided.items():
        if resolved.get(key, "auto") not in ("auto", value):
            given = shown(resolved[key])
            raise UserError(f'{path}: {key} is {given} but the run says {value}: write "auto" there')
        resolved[key] = value
    resolved.pop("train_batch_size", None)
    bf16 = resolved.setdefault("bf16", {})
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = precision_of(config) == torch.bfloat16
    resolved.setdefault("zero_allow_untested_optimizer", True)
    # Which optimizer an offload takes is decided below, by the device.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    resolved.setdefault("steps_per_print", 2**31)
    check_accepted(path, resolved)
    return resolved


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


@contextlib.contextmanager
def building(ds_config: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Builds modules in `dtype`; with ZeRO-3 every parameter is sharded as soon as its module exists."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if zero_stage(ds_config) == 3:
            # Its dtype comes from the config: given as an argument, 0.19.8 ignores it where float16 is not supported.
            with deepspeed.zero.Init(config_dict_or_path=ds_config):
                yield
        else:
            with torch.device(get_accelerator().current_device_name()):
                yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. `grad_norm` is over all parameters, before clipping; NaN or inf when skipped."""

    grad_norm: float
    skipped: bool
    lr: float


class Engine:
    """One phase's DeepSpeed engine."""

    def __init__(self, model: nn.Module, phase: Phase, config: RunConfig, ds_config: dict[str, Any]) -> None:
        named = dict(model.named_parameters())
        trainable = {name for group in phase.groups for name in group.parameters}
        for name, parameter in named.items():
            parameter.requires_grad_(name in trainable)
        groups = [
            {
                "params": [named[name] for name in group.parameters],
                "lr": config.lr * group.lr_scale,
                "weight_decay": group.weight_decay,
                "name": group.name,
                # Saved with the optimizer's state, which counts parameters and knows no names.
                "parameters": list(group.parameters),
            }
            for group in phase.groups
        ]
        self.stage = zero_stage(ds_config)
        optimizer = self._optimizer(groups, config, ds_config)
        with _answered_by(config.zero):
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        limit_waits(_patience(config))
        if isinstance(self.optimizer, FP16_UnfusedOptimizer):
            _undo_first_update(self.optimizer)
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.deepspeed.checkpoint_engine = self._shards = ShardFiles()
        # Scripts that unpickle whatever they are given; `checkpoint convert` and `export` do their work.
        self.deepspeed._copy_recovery_script = lambda save_path: None
        self._peak_lrs = [config.lr * group.lr_scale for group in phase.groups]

    @staticmethod
    def _optimizer(
        groups: Sequence[dict[str, Any]], config: RunConfig, ds_config: dict[str, Any]
    ) -> torch.optim.Optimizer:
        offload = offload_device(ds_config, "offload_optimizer")
        betas, eps = config.optimizer.betas, config.optimizer.eps
        if offload != "none" and on_gpu():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(list(groups), lr=config.lr, betas=betas, eps=eps, adamw_mode=True)
        return torch.optim.AdamW(list(groups), lr=config.lr, betas=betas, eps=eps, fused=True)

    @property
    def layout(self) -> dict[str, str]:
        """What decides, besides ranks and stage, how DeepSpeed's shards look: they are loaded by place, not by name."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        precision = "bf16" if self.deepspeed.bfloat16_enabled() else "fp32"
        return {
            "optimizer": f"{type(self.optimizer).__name__} of {type(inner).__name__}, {precision}",
            "order": hashlib.sha256(json.dumps(self._order()).encode()).hexdigest(),
        }

    def _order(self) -> list[list[str]]:
        """Names and sizes in the order in which the optimizer flattens them, by group or ZeRO-3's sub-group.

        sub_group_size changes it, and so would another order of modules.
        """
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        groups = next(
            (getattr(self.optimizer, name) for name in FLATTENED if hasattr(self.optimizer, name)),
            [group["params"] for group in self.optimizer.param_groups],
        )
        return [[f"{names[id(p)]} {math.prod(full_shape(p))}" for p in group] for group in groups]

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of one micro-batch; `loss` is already divided (see parallel/loss.py)."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self, lr_multiple: float) -> StepResult:
        """Updates the weights after the last micro-batch, or on no rank when a gradient is not finite.

        `lr_multiple` times each group's peak learning rate is the rate of this update: the schedule is a function of
        the step alone, so a skipped update or a resume cannot shift it.
        """
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * lr_multiple
        lr = self._peak_lrs[0] * lr_multiple
        if self.stage == 0:
            norm = self._full_norm()
            if not math.isfinite(norm):
                self._discard()
                return StepResult(norm, True, lr)
            self.deepspeed.step()
            return StepResult(norm, False, lr)
        self.deepspeed.step()
        skipped = bool(self.optimizer.overflow)
        norm = math.nan if skipped else float(self.optimizer._global_grad_norm)
        return StepResult(norm, skipped, lr)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The full, averaged gradient of a parameter between `backward` and `step`, on every rank; None without one."""
        from deepspeed.utils import safe_get_full_grad

        if self.stage == 0 and parameter.grad is not None:
            return parameter.grad
        return safe_get_full_grad(parameter)

    def collect(self, folder: Path, tag: str) -> dict[Path, Any]:
        """What DeepSpeed would write on this rank, by path under folder/tag, without frozen parameters. Collective.

        The tensors are those that training goes on to change.
        """
        with self._as_they_are():
            self.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        collected = self._shards.take()
        if self.stage == 3:
            for content in collected.values():
                if "module" in content:
                    content["module"] = {name: content["module"][name] for name in content["buffer_names"]}
        return collected

    @contextlib.contextmanager
    def _as_they_are(self) -> Iterator[None]:
        """ZeRO-3 would part with the parameters that it keeps whole, to save empty placeholders for all of them, and
        gather them again. No shard needs a placeholder."""
        before = {name: getattr(self.deepspeed, name) for name in SAVE_EVENTS}
        try:
            for name in SAVE_EVENTS:
                setattr(self.deepspeed, name, lambda: False)
            yield
        finally:
            for name, method in before.items():
                setattr(self.deepspeed, name, method)

    def trained_bytes(self, names: Iterable[str]) -> int:
        """Bytes of the named parameters in the precision that the model computes in."""
        parameters = dict(self.module.named_parameters())
        return sum(math.prod(full_shape(parameters[name])) * parameters[name].element_size() for name in names)

    def trained_weights(self, folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
        """The named parameters, whole, out of the shards in `folder`, rounded as the model rounds them."""
        parameters = dict(self.module.named_parameters())
        shards = Shards(folder, manifest, moments=False)
        found = {saved.name: saved.tensors["fp32"].to(parameters[saved.name].dtype) for saved in shards.parameters()}
        for name in names:
            # ZeRO has no shard of a parameter without elements.
            if not math.prod(full_shape(parameters[name])):
                found[name] = torch.empty(full_shape(parameters[name]), dtype=parameters[name].dtype)
        return {name: found[name] for name in names}

    def load(self, checkpoint: Path) -> None:
        """Reads DeepSpeed's shards of a checkpoint folder. Collective."""
        path, _ = self.deepspeed.load_checkpoint(
            str(checkpoint.parent),
            tag=checkpoint.name,
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise UserError(f"{checkpoint}: DeepSpeed found no shards there")
        # What a group is called and how it decays is said by this run, as it is on other ranks.
        for group, given in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(given)

    def _full_norm(self) -> float:
        source = self.optimizer.get_grads_for_norm() if hasattr(self.optimizer, "get_grads_for_norm") else None
        gradients = source or [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _discard(self) -> None:
        if hasattr(self.optimizer, "clear_hp_grads"):
            self.optimizer.clear_hp_grads()
            self.optimizer.clear_lp_grads()
        self.deepspeed.zero_grad()
        self.deepspeed.micro_steps += 1


@contextlib.contextmanager
def _answered_by(zero: str) -> Iterator[None]:
    """What DeepSpeed refuses in a configuration of the user's own, such as a setting of another device, is a UserError.

    A RuntimeError is that of a collective or of the device's memory.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError):
        raise
    except Exception as error:
        if not zero.endswith(".json"):
            raise
        reason = brief(error) or type(error).__name__
        raise UserError(f"--zero {zero}: DeepSpeed does not start with it ({reason}): correct it") from error


def _undo_first_update(optimizer: FP16_UnfusedOptimizer) -> None:
    """DeepSpeed's wrapper for bfloat16 without ZeRO makes an update with gradients of zero when it is made, which
    decays the masters and counts as a step."""
    with torch.no_grad():
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                master.copy_(weight)
    for state in optimizer.optimizer.state.values():
        state["step"].zero_()
