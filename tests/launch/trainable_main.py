"""Started by test_trainable.py on every rank: trainable.safetensors against the masters of the shards beside it.

Usage: trainable_main OUT DATA. Rank 0 writes OUT/result.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from pipeline.checkpoint.files import write_tensors
from pipeline.checkpoint.manifest import complete_checkpoints, read_manifest
from pipeline.checkpoint.trainable import TRAINABLE, trainable_content
from pipeline.checkpoint.universal_convert import Shards
from pipeline.cli import without_local_rank
from pipeline.config import RunConfig
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.job import train
from pipeline.parallel.topology import Topology
from pipeline.precision import precision_of
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.system import ParameterGroup, Phase
from tests.launch.resume_main import base, cases


def is_rounded(checkpoint: Path, precision: str, scratch: Path) -> bool:
    """Whether the file has the very bytes of the masters, rounded to the model's precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    shards = Shards(checkpoint, manifest, moments=False).parameters()
    write_tensors({saved.name: saved.tensors["fp32"].to(dtype) for saved in shards}, scratch)
    return scratch.read_bytes() == (checkpoint / TRAINABLE).read_bytes()


def deepspeed_reads(checkpoint: Path) -> bool:
    """Whether DeepSpeed's own zero_to_fp32 finds the very masters in it."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
    masters = {saved.name: saved.tensors["fp32"] for saved in Shards(checkpoint, manifest, moments=False).parameters()}
    return all(torch.equal(found[name], master) for name, master in masters.items())


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 6)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average += 1
        self.scratch += 1
        return self.large(self.small(x)).float().square().mean()


def averages(config: RunConfig, topology: Topology) -> dict[str, bool]:
    """What is collected for a checkpoint of a model with buffers, and what the next forward pass changes of it."""
    ds_config = deepspeed_config(config)
    # Of the parameters some are sharded and some, smaller ones, are kept whole.
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 17
    with building(ds_config, precision_of(config)):
        model = Averaging()
    names = tuple(name for name, _ in model.named_parameters())
    engine = Engine(model, Phase("train", 3, (ParameterGroup("all", names),)), config, ds_config)

    def step() -> None:
        engine.backward(engine.deepspeed(torch.ones(2, 4, dtype=precision_of(config))))
        engine.step(1.0)

    step()
    collected = engine.collect(Path("unused"), "tag")
    trainable, copied = trainable_content(engine.module, names, topology)
    whole = {name: value.clone() for name, value in trainable.items()}
    step()
    again, _ = trainable_content(engine.module, names, topology)
    held = [content["module"]["average"] for content in collected.values() if "module" in content]
    if topology.rank:
        return {"rank 0 alone has it": not trainable and not again}
    return {
        "the shards hold the average of their step": bool(held) and all(bool(value.eq(1).all()) for value in held),
        "so does what was trained": bool(trainable["average"].eq(1).all()) and set(trainable) == {*names, "average"},
        "copies do not change": not copied or all(torch.equal(whole[name], trainable[name]) for name in whole),
        "an update shows": all(not torch.equal(whole[name], again[name]) for name in names),
        "only ZeRO-3 copies parameters": copied == (engine.stage == 3),
    }


def main() -> None:
    out, data = map(Path, without_local_rank(sys.argv[1:]))
    found: dict[str, dict[str, bool]] = {}
    wanted: dict[str, dict[str, object]] = {
        f"{precision} zero{stage}": {"zero": f"zero{stage}", "precision": precision, "async_save": stage % 2 == 1}
        for precision in ("fp32", "bf16")
        for stage in range(4)
    }
    frozen = cases()["zero3 frozen background"]
    wanted["frozen"] = {**frozen, "precision": "bf16"}
    for number, (case, changes) in enumerate(wanted.items()):
        folder = out / f"run{number}"
        train(base(folder, data, **{**changes, "steps": 3, "save_every": 1, "keep": 3}))
        if dist.get_rank() == 0:
            saved = complete_checkpoints(folder / "checkpoints")
            precision = str(changes["precision"])
            found[case] = {path.name: is_rounded(path, precision, out / "expected") for path in saved}
            if changes["zero"] != "zero0":  # which has no parts to join
                found[case]["zero_to_fp32"] = deepspeed_reads(saved[-1])
            assert len(saved) == 3
        dist.barrier()
    topology = start(base(out, data))
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            config = base(out, data, zero=f"zero{stage}", precision=precision, grad_accum=1, lr=0.1)
            facts = averages(config, topology)
            found[f"averages, {precision} zero{stage}"] = facts
            assert all(facts.values()), (topology.rank, precision, stage, facts)
    if topology.rank == 0:
        (out / "result.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
