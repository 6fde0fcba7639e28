"""DeepSpeed: build a sharded model, and initialise, backward, step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from pipeline.checkpoint.average import Average
from pipeline.checkpoint.shards import ShardFiles
from pipeline.config import RunConfig
from pipeline.ds_config import offload_device, zero_stage
from pipeline.errors import UserError, brief
from pipeline.host.hardware import on_gpu
from pipeline.loss_scale import LossScale, undo_first_update
from pipeline.parallel.muon import import_muon
from pipeline.parallel.topology import limit_waits
from pipeline.parallel.weights import full_shape
from pipeline.runtime.ranks import collective_timeout
from pipeline.schedule import Schedule, schedule_of
from pipeline.system import Phase

FLATTENED = ("bit16_groups", "bf16_groups", "fp16_groups")
"""Where DeepSpeed's optimizers (stages 1 and 2, bfloat16 beside them, stage 3 and none) hold parameters in the order of
their shards."""
SAVE_EVENTS = ("_optimizer_has_ckpt_event_prologue", "_optimizer_has_ckpt_event_epilogue")


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
    """What an optimizer step did. `grad_norm` is over all parameters, before clipping and without the loss scale; NaN
    or inf when skipped."""

    grad_norm: float
    skipped: bool
    lr: float
    loss_scale: float | None = None
    """Factor of the loss in this step's backward passes; None unless the model computes in float16."""
    scale_was_lowered: bool = False
    """Whether the loss scale was too large, which is why the update was skipped; the next step's is less."""


class Engine:
    """One phase's DeepSpeed engine."""

    def __init__(self, model: nn.Module, phase: Phase, config: RunConfig, ds_config: dict[str, Any]) -> None:
        named = dict(model.named_parameters())
        schedule = phase.schedule or schedule_of(config)
        trainable = {name for group in phase.groups for name in group.parameters}
        for name, parameter in named.items():
            parameter.requires_grad_(name in trainable)
        groups = [
            {
                "params": [named[name] for name in group.parameters],
                "lr": schedule.peak * group.lr_scale,
                "weight_decay": group.weight_decay,
                "name": group.name,
                # Saved with the optimizer's state, which counts parameters and knows no names.
                "parameters": list(group.parameters),
            }
            for group in phase.groups
        ]
        self.stage = zero_stage(ds_config)
        optimizer = self._optimizer(groups, schedule, ds_config)
        import_muon()
        with _answered_by(config.zero):
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        limit_waits(collective_timeout(config))
        if isinstance(self.optimizer, FP16_UnfusedOptimizer):
            undo_first_update(self.optimizer)
        self.loss_scale = LossScale(self.optimizer) if self.deepspeed.fp16_enabled() else None
        decay = config.optimizer.ema_decay
        self.average = Average(self.optimizer, self.module, decay) if decay else None
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.deepspeed.checkpoint_engine = self._shards = ShardFiles()
        # Scripts that unpickle whatever they are given; `checkpoint convert` and `export` do their work.
        self.deepspeed._copy_recovery_script = lambda save_path: None
        if self.stage == 0 and self.deepspeed.dp_world_size == 1:
            # There is nothing to reduce, and DeepSpeed would copy all gradients to a buffer and back. The call that is
            # left gives parameters without a gradient one of zeros, as a reduction does.
            self.deepspeed.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: (
                self.deepspeed._get_gradients_for_reduction()
            )
        self._peak_lrs = [schedule.peak * group.lr_scale for group in phase.groups]

    @staticmethod
    def _optimizer(
        groups: Sequence[dict[str, Any]], schedule: Schedule, ds_config: dict[str, Any]
    ) -> torch.optim.Optimizer:
        offload = offload_device(ds_config, "offload_optimizer")
        lr, betas, eps = schedule.peak, schedule.betas, schedule.eps
        if offload != "none" and on_gpu():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(list(groups), lr=lr, betas=betas, eps=eps, adamw_mode=True)
        return torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=True)

    @property
    def layout(self) -> dict[str, str]:
        """What decides, besides ranks and stage, how DeepSpeed's shards look: they are loaded by place, not by name."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        precision = "bf16" if self.deepspeed.bfloat16_enabled() else "fp16" if self.loss_scale else "fp32"
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
        if self.loss_scale is not None and self.stage == 0:
            # Without ZeRO, DeepSpeed 0.19.8 divides the gradients by the scale, and does not multiply the loss by it.
            loss = loss * self.loss_scale.value
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self, lr_multiple: float) -> StepResult:
        """Updates the weights after the last micro-batch, or on no rank when a gradient is not finite.

        `lr_multiple` times each group's peak learning rate is the rate of this update: the schedule is a function of
        the step alone, so a skipped update or a resume cannot shift it.
        """
        result = self._update(lr_multiple)
        if self.average is not None and not result.skipped:
            self.average.update()
        return result

    def _update(self, lr_multiple: float) -> StepResult:
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * lr_multiple
        lr = self._peak_lrs[0] * lr_multiple
        if self.loss_scale is not None:
            return self._scaled_step(self.loss_scale, lr)
        if self.stage == 0:
            norm = self._full_norm()
            if not math.isfinite(norm):
                self._discard()
                return StepResult(norm, True, lr)
            self.deepspeed.step()
            return StepResult(norm, False, lr)
        self.deepspeed.step()
        skipped = bool(self.optimizer.overflow)
        if skipped:
            self._drop_gradients()
        norm = math.nan if skipped else float(self.optimizer._global_grad_norm)
        return StepResult(norm, skipped, lr)

    def _scaled_step(self, loss_scale: LossScale, lr: float) -> StepResult:
        """DeepSpeed divides the gradients by the scale, and makes no update on any rank when one is not finite."""
        scale = loss_scale.value
        self.deepspeed.step()
        skipped = bool(self.optimizer.overflow)
        if skipped:
            self._drop_gradients()
        # Without ZeRO, DeepSpeed's norm is that of the gradients before the division.
        norm = math.nan if skipped else float(self.optimizer._global_grad_norm) / (1.0 if self.stage else scale)
        return StepResult(norm, skipped, lr, scale, loss_scale.update(skipped))

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The full, averaged gradient of a parameter between `backward` and `step`, times the loss scale, on every
        rank; None without one."""
        from deepspeed.utils import safe_get_full_grad

        if self.stage == 0 and parameter.grad is not None:
            return parameter.grad
        return safe_get_full_grad(parameter)

    def collect(self, folder: Path, tag: str) -> dict[Path, Any]:
        """What DeepSpeed would write on this rank, by path under folder/tag, without frozen parameters. Collective.

        The parameters are those that training goes on to change. Buffers are copies: the next forward pass may change
        them, and a save in the background makes the others wait for the next update alone.
        """
        with self._without_placeholders():
            self.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        collected = self._shards.pop_collected()
        for content in collected.values():
            if "module" in content:
                buffers = {name: content["module"][name].clone() for name in content["buffer_names"]}
                if self.stage == 3:
                    content["module"] = buffers
                else:
                    content["module"].update(buffers)  # in place: the kind of mapping is part of the file
        return collected

    @contextlib.contextmanager
    def _without_placeholders(self) -> Iterator[None]:
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
        # A group's name and weight decay are those of this run, as on a load with other ranks.
        for group, given in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(given)

    def close(self) -> None:
        """Lets go of the optimizer's memory; the engine is of no use after it."""
        self.deepspeed.destroy()

    def _full_norm(self) -> float:
        source = self.optimizer.get_grads_for_norm() if hasattr(self.optimizer, "get_grads_for_norm") else None
        gradients = source or [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _drop_gradients(self) -> None:
        """After a skipped update with offload, DeepSpeed 0.19.8 (stages 1 and 2) would add the next step's gradients to
        those that were not finite, and skip every later update."""
        kept = getattr(self.optimizer, "averaged_gradients", {}) if self.stage in (1, 2) else {}
        for group in kept:
            kept[group] = None

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
