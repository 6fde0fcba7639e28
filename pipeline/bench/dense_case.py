"""The contenders of `bench dense` on every rank: each is built once, and all make their steps in turn."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.bench.dense import MARK, Contender, contenders
from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig, replace
from pipeline.create_run import create_run
from pipeline.data.batch import TokenBatch
from pipeline.errors import UserError
from pipeline.host.versions import versions
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.load import checked_system, load_model, resolve
from pipeline.meter import Meter
from pipeline.parallel.topology import Topology
from pipeline.runtime.ranks import describe_devices, device_of, start, stop
from pipeline.system import ParameterGroup
from pipeline.train import Trainer

BACKBONE = "backbone."
"""What stands before transformers' names in those of a system's decoder."""

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of the first losses beyond which two contenders do not train the same model."""


class Steps(Protocol):
    """What makes a step; `step` returns the loss before its update, averaged over ranks."""

    def step(self) -> float: ...


class Engine:
    """A step of `train`: data, forward, backward, update, and its row of numbers."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.run = create_run(resolve(checked_system(config, topology), topology), topology)
        self.trainer, self.meter, self.done = Trainer(self.run), Meter(self.run), 0

    def step(self) -> float:
        self.done += 1
        return self.meter.record(self.done, self.trainer.step(self.done, self.meter)).loss


class Plain:
    """transformers' model, cross-entropy and torch.optim.AdamW, as a person would write them down."""

    def __init__(self, config: RunConfig, topology: Topology, batches: Sequence[TokenBatch]) -> None:
        self.config, self.topology, self.batches, self.done = config, topology, batches, 0
        system = checked_system(config, topology)
        loaded = load_model(config, system, topology)
        weights = loaded.model.backbone.state_dict()  # type: ignore[union-attr]
        assert isinstance(config.model.backbone, BackboneConfig)  # type: ignore[attr-defined]
        sizes = backbone_config(config.model.backbone)  # type: ignore[attr-defined]
        sizes._attn_implementation = "sdpa"
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(sizes)]
        model: nn.Module = kind(sizes).to(device_of(topology))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, "a tied head is the embedding"
        self.model = DistributedDataParallel(model) if topology.world > 1 else model
        betas, eps = config.optimizer.betas, config.optimizer.eps
        # As the engine's: the slower loops over tensors would be no comparison.
        self.optimizer = torch.optim.AdamW(
            decay_groups(model, loaded.phases[0].groups, config), lr=config.lr, betas=betas, eps=eps, fused=True
        )

    def step(self) -> float:
        batch = self.batches[self.done % len(self.batches)]
        self.done += 1
        # transformers shifts `labels`, and takes those that are shifted already beside them.
        output = self.model(input_ids=batch.input_ids, labels=batch.labels, shift_labels=batch.labels, use_cache=False)
        output.loss.backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = output.loss.detach()
        if self.topology.world > 1:
            dist.all_reduce(loss)
        return float(loss) / self.topology.world


def decay_groups(model: nn.Module, groups: Sequence[ParameterGroup], config: RunConfig) -> list[dict[str, Any]]:
    """The parameters of a plain decoder with the rates and decays that they have in a system's groups. Raises UserError
    where the system trains something else besides."""
    own = dict(model.named_parameters())
    found: list[dict[str, Any]] = []
    for group in groups:
        names = [name.removeprefix(BACKBONE) for name in group.parameters]
        strange = [name for name in names if name not in own]
        if strange:
            raise UserError(
                f"{config.recipe} trains {strange[0]}, which the plain decoder lacks: leave it out, or name another"
                " recipe"
            )
        lr = config.lr * group.lr_scale
        found.append({"params": [own[name] for name in names], "lr": lr, "weight_decay": group.weight_decay})
    return found


def run_case(words: Sequence[str]) -> None:
    """The contenders of this number of ranks, given the rounds, whether to compile, and the recipe's words; rank 0
    prints their seconds by round, those of the slowest rank."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rounds, compiled, words = int(words[0]), words[1] == "1", words[2:]
    config = parse_run(words, "bench dense-case", ranks=world)
    backbone = getattr(config.model, "backbone", None)
    if not isinstance(backbone, BackboneConfig) or not backbone.trainable:
        raise UserError(f"{config.recipe} has no decoder that is trained as a whole: name another recipe")
    config = replace(config, batch_size=config.batch_size // world, warmup_steps=0, steps=rounds + 2)
    topology = start(config)
    try:
        taking_part = contenders(world, compiled=compiled)
        built = {contender.name: _build(contender, config, topology) for contender in taking_part}
        losses = {name: steps.step() for name, steps in built.items()}
        check_losses(losses, taking_part)
        seconds: dict[str, list[float]] = {name: [] for name in built}
        for number in range(rounds):
            names = list(built)
            # Every other round backwards: what comes first in a round may find another machine.
            for name in names if number % 2 == 0 else reversed(names):
                seconds[name].append(_timed(built[name], topology))
        if topology.rank == 0:
            plain = next(steps for steps in built.values() if isinstance(steps, Plain))
            figures = {
                "seconds": seconds, "losses": losses,
                "parameters": sum(parameter.numel() for parameter in plain.model.parameters()),
                "facts": {"machine": describe_devices(topology), "versions": versions()},
            }  # fmt: skip
            print(MARK + json.dumps(figures), flush=True)
    finally:
        stop()


def _build(contender: Contender, config: RunConfig, topology: Topology) -> Steps:
    if contender.zero is not None:
        changes = {"zero": contender.zero, "precision": contender.precision, "compile": contender.compiled}
        return Engine(replace(config, **changes), topology)
    system = checked_system(config, topology)
    loader = system.loader(system.phases(system.build())[0], topology)
    device = device_of(topology)
    # Read before anything is timed: the plain loop is not charged for its data.
    batches = [batch.to(device) for _ in range(config.steps) for batch in loader.next_step()]
    return Plain(replace(config, precision=contender.precision), topology, batches)


def _timed(steps: Steps, topology: Topology) -> float:
    """Seconds of a step on the slowest rank."""
    if topology.world > 1:
        dist.barrier()
    begun = time.perf_counter()
    steps.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=device_of(topology))
    if topology.world > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def check_losses(losses: dict[str, float], taking_part: Sequence[Contender]) -> None:
    """Raises UserError where contenders begin with other losses: they would not do the same work."""
    plain = next(losses[contender.name] for contender in taking_part if contender.zero is None)
    for contender in taking_part:
        loss = losses[contender.name]
        if not math.isclose(loss, plain, rel_tol=TOLERANCE[contender.precision]):
            raise UserError(
                f"the first loss is {loss:.5f} with {contender.name} and {plain:.5f} in the plain loop, so they train"
                " other models: leave out what the plain decoder lacks"
            )
