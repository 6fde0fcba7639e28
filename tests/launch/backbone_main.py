"""Started by test_backbones.py on every rank: each family of backbones, its sequence shared by the ranks.

Usage: backbone_main OUT. Rank 0 writes OUT/result.json: by family with every parameter sharded (and one of them with
ZeRO-1, and frozen), largest differences from transformers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.cli import without_local_rank
from pipeline.config import ParallelConfig, RunConfig
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.lm.backbone import build_backbone
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext, System
from pipeline.systems.miras import create
from tests.launch.parity_main import LENGTH, base, everything_sharded
from tests.launch.whole import full_state
from tests.lm.families import FAMILIES, decoder, our_logits, plain_logits, save_decoder
from tests.systems.miras.harness import batch, tokens

LENGTHS = [29, LENGTH - 29]
LR = 0.1
TIED = "smollm2"


def config_of(folder: Path, *, trainable: bool = True, **changes: Any) -> RunConfig:
    config = base("full")
    backbone = BackboneConfig(pretrained=str(folder), trainable=trainable)
    model = dataclasses.replace(config.model, backbone=backbone)  # type: ignore[call-arg]
    return dataclasses.replace(config, model=model, parallel=ParallelConfig(sequence=2), **changes)


def largest(found: Tensor, expected: Tensor, *, relative: bool = False) -> float:
    return float((found - expected).abs().max() / (expected.abs().max() if relative else 1))


def logits(folder: Path, plain: Any, topology: Topology) -> float:
    """Of this rank's part, the largest over the ranks."""
    backbone = build_backbone(backbone_config(BackboneConfig(pretrained=str(folder))))
    backbone.load_state_dict(plain.state_dict())
    ids = tokens().unsqueeze(0)
    with torch.no_grad():
        found = our_logits(backbone, ids, LENGTHS, AttentionConfig(kind="full"), topology)
        expected = plain_logits(plain, ids, LENGTHS)[:, topology.shard(LENGTH)]
    difference = torch.tensor(largest(found, expected))
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return float(difference)


def started(config: RunConfig, topology: Topology) -> tuple[System, Engine]:
    system = create(config)
    ds_config = deepspeed_config(config)
    with building(ds_config, torch.float32):
        model = system.build()
    system.initialise(model, topology)
    (phase,) = system.phases(model)
    return system, Engine(model, phase, config, ds_config)


def saved_names(engine: Engine, out: Path) -> list[str]:
    """Parameters of the backbone in this rank's DeepSpeed files."""
    files = engine.collect(out / "shards", "step").values()
    names = {name for file in files for shapes in file.get("param_shapes") or [] for name in shapes}
    names |= {name for file in files for name in file.get("module") or {}}
    return sorted(name for name in names if name.startswith("backbone."))


def step(config: RunConfig, plain: Any, topology: Topology, out: Path) -> dict[str, Any]:
    """One update: gradients beside those of transformers, and how far weights move.

    Adam's first update is the learning rate times the sign of a gradient.
    """
    system, engine = started(config, topology)
    part = batch(tokens(), LENGTHS)
    counts = SyncPoint(topology)("step 1", counts=add_counts([system.count(part)]))
    output = system.forward(engine.deepspeed, part, {}, StepContext(topology, 0, "train", 1))
    engine.backward(scaled_loss(output.sums, counts, topology))
    found = {name: engine.gradient(p).clone() for name, p in engine.module.named_parameters()}  # type: ignore[union-attr]
    before = full_state(engine.module, found)
    engine.step(1.0)
    after = full_state(engine.module, found)
    losses = F.cross_entropy(plain_logits(plain, part.input_ids, LENGTHS)[0], part.labels[0], reduction="none")
    (losses.sum() / counts["cross_entropy"]).backward()
    expected = {f"backbone.{name}": p.grad for name, p in plain.named_parameters()}
    names = {name for name in found if name.startswith("backbone.")}
    moved = [largest(after[name], before[name]) for name in names & after.keys()]
    return {
        "gradients": max(largest(found[name], value, relative=True) for name, value in expected.items()),
        "same names": names == expected.keys(),
        "every parameter moves": not moved or min(moved) > LR / 2,
        "saved": saved_names(engine, out),
    }


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    topology = start(dataclasses.replace(base(), parallel=ParallelConfig(sequence=2)))
    sharded = everything_sharded(out, topology.rank)
    found: dict[str, dict[str, Any]] = {}
    for name in FAMILIES:
        folder = out / name
        if topology.rank == 0:
            save_decoder(name, folder)
        dist.barrier()
        plain = decoder(name)
        found[name] = {"logits": logits(folder, plain, topology)}
        found[name] |= step(config_of(folder, zero=sharded, lr=LR, batch_size=1), plain, topology, out)
        if name == TIED:
            plain.zero_grad()
            found["zero1"] = step(config_of(folder, zero="zero1", lr=LR, batch_size=1), plain, topology, out)
            frozen = config_of(folder, trainable=False, zero="zero1", batch_size=1)
            found["frozen"] = {"saved": saved_names(started(frozen, topology)[1], out)}
    if topology.rank == 0:
        (out / "result.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
