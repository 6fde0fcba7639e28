"""Started by test_mimir.py on two data ranks: gradients beside plain PyTorch's, held-out numbers, and resumes.

Usage: mimir_main OUT. Rank 0 writes OUT/result.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.callbacks.metrics import read_rows
from pipeline.cli import without_local_rank
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.job import train
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext
from pipeline.systems.mimir.data.build import list_peptides
from tests.launch.comparing import differences as unlike
from tests.launch.parity_main import everything_sharded
from tests.systems.mimir.harness import created, small

LAST, MIDDLE = 8, 3
"""Steps of a run, and of its checkpoint in the middle of an epoch, from which another goes on over the epoch's end."""
PEPTIDES = {
    "data__dataset": "synthetic:120", "evaluation__batch_size": 16, "sequence_length": 10, "model__max_length": 10,
    "model__timesteps": 4,
}  # fmt: skip
ABSORBING = {"model__kernel": "absorbing", "model__timesteps": 10, "model__mask_weight": 1.5}
MODELS: dict[str, dict[str, Any]] = {
    "uniform": {"model__hybrid_loss_coeff": 0.1},
    "absorbing": {**ABSORBING, "model__length": "head", "model__hybrid_loss_coeff": 0.1},
    "encoder": {"model__target": "encoder", "model__loss": "bound"},
}
STAGES = {"uniform": (0, 1, 2, 3), "absorbing": (2, 3), "encoder": (1, 3)}
"""ZeRO stages whose gradients are compared, stage 3 with every parameter sharded."""
RUNS: dict[str, dict[str, Any]] = {
    "zero1 uniform": {"zero": "zero1", **MODELS["uniform"], "optimizer__ema_decay": 0.9},
    "zero3 absorbing bf16": {
        "zero": "zero3", "precision": "bf16", **MODELS["absorbing"], "model__curriculum_epochs": 2.0,
        "optimizer__ema_decay": 0.9,
    },
    "zero0 encoder fp16": {"zero": "zero0", "precision": "fp16", "model__target": "encoder"},
}  # fmt: skip


def randomise(name: str, shape: torch.Size) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator_for(7, name))
    return 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise


def gradients(name: str, stage: int, zero: str, topology: Topology) -> dict[str, Any]:
    """The largest relative difference of a parameter's gradient from that of one process without DeepSpeed, which takes
    the step of 32 peptides as one batch; and of the norm, and of the held-out numbers of the same weights."""
    config = small(
        zero=zero, batch_size=8, grad_accum=32 // (8 * topology.data), clip=0.0, **{**PEPTIDES, **MODELS[name]}
    )
    found_peptides = list_peptides(config)
    system = created(config, found_peptides)
    ds_config = deepspeed_config(system.config)
    with building(ds_config, torch.float32):
        model = system.build()
    system.initialise(model, topology)
    fill(model, randomise)
    (phase,) = system.phases(model)
    engine = Engine(model, phase, system.config, ds_config)
    batches = system.loader(phase, topology).next_step()
    counts = SyncPoint(topology)("step 1", counts=add_counts(map(system.count, batches)))
    for batch in batches:
        output = system.forward(engine.deepspeed, batch, {}, StepContext(topology, 0, "train", 1))
        engine.backward(scaled_loss(output.sums, counts, topology))
    found = {n: engine.gradient(p).clone() for n, p in engine.module.named_parameters()}  # type: ignore[union-attr]
    held_out = system.evaluate(engine.deepspeed, phase, SyncPoint(topology)).scalars
    norm = engine.step(1.0).grad_norm

    alone = created(dataclasses.replace(config, batch_size=32, grad_accum=1), found_peptides)
    plain = alone.build()
    alone.initialise(plain, Topology())
    with torch.no_grad():
        for parameter_name, parameter in plain.named_parameters():
            parameter.copy_(randomise(parameter_name, parameter.shape))
    (whole,) = alone.loader(phase, Topology()).next_step()
    output = alone.forward(plain, whole, {}, StepContext(Topology(), 0, "train", 1))
    counted = alone.count(whole)
    torch.stack([value / counted[term] for term, value in output.sums.items()]).sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    size = torch.nn.utils.get_total_norm([gradient for gradient in expected.values() if gradient is not None])
    differences: dict[str, float] = {}
    for parameter_name, gradient in expected.items():
        assert gradient is not None, parameter_name
        # Of a parameter that nothing in the batch uses, it is zero in both.
        difference = float((found[parameter_name] - gradient).norm())
        differences[parameter_name] = difference / max(float(gradient.norm()), 1e-4 * float(size))
    reference = alone.evaluate(plain, phase, SyncPoint(Topology())).scalars
    worst = max(differences, key=differences.__getitem__)
    return {
        "parameter": worst,
        "gradient": differences[worst],
        "norm": abs(norm / float(size) - 1),
        "held out": max(abs(held_out[key] / value - 1) for key, value in reference.items() if abs(value) > 1e-3),
    }


def resumed(out: Path, number: int, changes: dict[str, Any]) -> dict[str, Any]:
    """In what a run that goes on from the middle of an epoch differs from one that was never interrupted."""
    settings: dict[str, Any] = {
        "batch_size": 8, "save_every": MIDDLE, "keep": 3, "steps": LAST, **PEPTIDES, **changes,
    }  # fmt: skip
    straight, other = out / f"straight{number}", out / f"resumed{number}"
    train(small(output_dir=straight, **settings))
    train(small(output_dir=other, resume=str(straight / "checkpoints" / f"checkpoint-{MIDDLE}"), **settings))
    if dist.get_rank() != 0:
        return {}
    rows = [[row for row in read_rows(run / "metrics.jsonl") if row["mode"] == "train"] for run in (straight, other)]
    last = [run / "checkpoints" / f"checkpoint-{LAST}" for run in (straight, other)]
    cursor = json.loads((straight / "checkpoints" / f"checkpoint-{MIDDLE}" / "loader.json").read_text())
    return {
        "losses": [[row["loss"] for row in run] for run in rows],
        "differences": unlike(*last),
        "average": (last[0] / "average.safetensors").is_file(),
        "cursor": [cursor["epoch"], cursor["offset"]],
        "epochs": [row.get("epoch") for row in rows[0]],
    }


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    # Few CPUs say that they have float16; what training needs of it every one does.
    get_accelerator().is_fp16_supported = lambda: True
    topology = start(small())
    found: dict[str, Any] = {"gradients": {}, "resumed": {}}
    for name in MODELS:
        for stage in STAGES[name]:
            zero = everything_sharded(out, topology.rank) if stage == 3 else f"zero{stage}"
            found["gradients"][f"{name} zero{stage}"] = gradients(name, stage, zero, topology)
    for number, (name, changes) in enumerate(RUNS.items()):
        found["resumed"][name] = resumed(out, number, changes)
        dist.barrier()
    if topology.rank == 0:
        (out / "result.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
