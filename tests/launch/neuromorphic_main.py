"""Started by test_neuromorphic.py on two data ranks: gradients beside one process's, resumes; and on one: a resume.

Usage: neuromorphic_main OUT. Rank 0 writes OUT/result-RANKS.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.loader_state import LOADER_STATE
from pipeline.cli import without_local_rank
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.job import train
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, StepContext, System
from tests.launch.comparing import differences as unlike
from tests.launch.parity_main import everything_sharded
from tests.systems.neuromorphic.harness import created, documents, small

ROWS, LAST = 4, 9
"""Streams of the run, and its steps: three a phase."""
GRADIENTS = {"A": (0, 3), "B": (1, 2), "C": (0, 3)}
"""ZeRO stages by phase, stage 3 with every parameter sharded."""
RUNS: dict[str, dict[str, Any]] = {
    "zero1": {"zero": "zero1"},
    "zero3 bf16": {
        "zero": "zero3", "precision": "bf16", "save_every": 5, "model__layers": 1, "evaluation__steps": 1,
    },
}  # fmt: skip
"""States of several layers are those of the first; what shards and rounds, the second, is slow by the layer."""
PLACES = {"zero1": (2, 6, 8), "zero3 bf16": (5,)}
"""Steps from which a run goes on, over the switches behind them: in A, where B ended, in lifelong mode; in B."""
ALONE = 5
"""The step from which one rank goes on."""


def steps(system: System[Any], model: Any, phase: Any, topology: Topology, backward: Any) -> None:
    """Two steps of which the second is differentiated: its streams come with what the first wrote."""
    loader = system.loader(phase, topology)
    carries: list[Carry] = [{} for _ in range(system.config.grad_accum)]
    for step in (1, 2):
        batches = loader.next_step()
        counts = SyncPoint(topology)("step", counts=add_counts(map(system.count, batches)))
        for micro, batch in enumerate(batches):
            context = StepContext(topology, system.config.seed, phase.name, step, heavy_metrics=step == 2)
            with torch.set_grad_enabled(step == 2):
                output = system.forward(model, batch, carries[micro], context)
            if step == 2:
                backward(scaled_loss(output.sums, counts, topology))
            carries[micro] = {
                name: dataclasses.replace(x, tensor=x.tensor.detach()) for name, x in output.carry.items()
            }


@dataclasses.dataclass(frozen=True)
class Reference:
    """Of one process without DeepSpeed, which takes all streams as one batch."""

    gradients: dict[str, torch.Tensor | None]
    """Of what the phase trains."""
    held_out: float


def reference(out: Path, name: str) -> Reference:
    """What a phase gives in this process alone. Collective: weights are filled together."""
    system = created(small(out, batch_size=ROWS))
    model = system.build()
    system.initialise(model, Topology())
    phase = next(phase for phase in system.phases(model) if phase.name == name)
    trained = {name for group in phase.groups for name in group.parameters}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    steps(system, model, phase, Topology(), lambda loss: loss.backward())
    gradients = {n: p.grad for n, p in model.named_parameters() if n in trained}
    return Reference(gradients, system.evaluate(model, phase, SyncPoint(Topology())).scalars["loss"])


def gradients(out: Path, name: str, stage: int, zero: str, topology: Topology, alone: Reference) -> dict[str, Any]:
    """The largest relative difference of a parameter's gradient from that of `alone`; and of the held-out loss."""
    system = created(small(out, zero=zero, batch_size=1, grad_accum=ROWS // topology.data, clip=0.0))
    ds_config = deepspeed_config(system.config)
    with building(ds_config, torch.float32):
        model = system.build()
    system.initialise(model, topology)
    phase = next(phase for phase in system.phases(model) if phase.name == name)
    engine = Engine(model, phase, system.config, ds_config)
    steps(system, engine.deepspeed, phase, topology, engine.backward)
    trained = {name for group in phase.groups for name in group.parameters}
    found = {n: engine.gradient(p).clone() for n, p in engine.module.named_parameters() if n in trained}  # type: ignore[union-attr]
    held_out = system.evaluate(engine.deepspeed, phase, SyncPoint(topology)).scalars["loss"]
    engine.step(1.0)

    expected = alone.gradients
    assert found.keys() == expected.keys()
    size = float(torch.nn.utils.get_total_norm([gradient for gradient in expected.values() if gradient is not None]))
    apart: dict[str, float] = {}
    for parameter_name, gradient in expected.items():
        assert gradient is not None, parameter_name
        difference = float((found[parameter_name] - gradient).norm())
        apart[parameter_name] = difference / max(float(gradient.norm()), 1e-4 * size)
    worst = max(apart, key=apart.__getitem__)
    return {
        "parameter": worst,
        "gradient": apart[worst],
        "unreached": [n for n, gradient in expected.items() if gradient is not None and not gradient.any()],
        "held out": abs(held_out / alone.held_out - 1),
    }


def settings(**changes: Any) -> dict[str, Any]:
    return {"batch_size": ROWS // 2, "save_every": 1, "eval_every": 4, "sample_every": 4, "ablate_every": 4, **changes}


def losses(folder: Path) -> list[list[Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [[row["step"], row["phase"], row["loss"]] for row in rows if row["mode"] == "train"]


EVENTS = ("grad_norm", "warn_high_grad_norm", "nan_grad_steps", "stream_restarts_total")


def events(folder: Path) -> list[list[Any]]:
    """Of every row of training with a checkpoint: EVENTS, and the restarts of streams that the checkpoint has."""
    found = []
    for row in read_rows(folder / "metrics.jsonl"):
        state = folder / "checkpoints" / f"checkpoint-{row['step']}" / LOADER_STATE
        if row["mode"] == "train" and state.is_file():
            cursors = json.loads(state.read_text())["streams"].values()
            found.append([*(row[name] for name in EVENTS), sum(cursor["epoch"] for cursor in cursors)])
    return found


def resumed(out: Path, number: int, name: str) -> dict[str, Any]:
    """In what runs that go on from several places differ from one in a piece, which evaluates and samples more."""
    straight, changes = out / f"straight{number}", settings(**RUNS[name])
    # As rarely and little as can be: where a phase ends.
    unwatched = {
        **changes, "eval_every": 0, "sample_every": 0, "ablate_every": 0, "save_every": 4, "evaluation__steps": 1,
    }  # fmt: skip
    train(small(out, output_dir=straight, **changes))
    others = {}
    for step in PLACES[name]:
        others[str(step)] = out / f"resumed{number}-{step}"
        place = str(straight / "checkpoints" / f"checkpoint-{step}")
        train(small(out, output_dir=others[str(step)], resume=place, **unwatched))
    if dist.get_rank() != 0:
        return {}
    last = f"checkpoints/checkpoint-{LAST}"
    found = {place: unlike(straight / last, other / last) for place, other in others.items()}
    return {"differences": found, "losses": losses(straight), "events": events(straight)}


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    topology = start(small(out))
    found: dict[str, Any] = {}
    if topology.world == 1:
        place = str(out / "straight0" / "checkpoints" / f"checkpoint-{ALONE}")
        train(small(out, output_dir=out / "alone", resume=place, batch_size=ROWS))
        found = {"losses": losses(out / "alone")}
    else:
        if topology.rank == 0:
            documents(out / "documents")
        dist.barrier()
        found = {"gradients": {}, "resumed": {}}
        for name, stages in GRADIENTS.items():
            alone = reference(out, name)
            for stage in stages:
                zero = everything_sharded(out, topology.rank) if stage == 3 else f"zero{stage}"
                found["gradients"][f"{name} zero{stage}"] = gradients(out, name, stage, zero, topology, alone)
        for number, name in enumerate(RUNS):
            found["resumed"][name] = resumed(out, number, name)
            dist.barrier()
    if topology.rank == 0:
        (out / f"result-{topology.world}.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
