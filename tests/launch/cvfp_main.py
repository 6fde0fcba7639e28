"""Started by test_cvfp.py on two data ranks: gradients and statistics beside one process's, resumes, and a control.

Usage: cvfp_main OUT. Rank 0 writes OUT/result.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.callbacks.metrics import read_rows
from pipeline.cli import without_local_rank
from pipeline.config import RunConfig
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.job import train
from pipeline.load import decide
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, gathered, generator_for
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, StepContext, System, create_system
from pipeline.systems.cvfp.config import SolveConfig
from tests.launch.comparing import differences as unlike
from tests.launch.parity_main import everything_sharded
from tests.systems.cvfp.harness import documents, small

ROWS = 8
"""Of the global batch."""
MODELS: dict[str, dict[str, Any]] = {
    "fixed_point document": {"grad_accum": 2},
    "fixed_point log_det cosine": {
        "grad_accum": 1, "fixed_point__diversity": "log_det", "fixed_point__distance": "cosine",
    },
    "fixed_point stream": {"grad_accum": 1, "model__carry": "stream"},
    "fixed_point circular by sweeps": {
        "grad_accum": 1, "model__carry": "circular", "model__solve": SolveConfig("jacobi", tolerance=1e-7),
    },
    "prediction document": {"grad_accum": 2},
    "prediction stream": {"grad_accum": 1, "model__carry": "stream"},
    "prediction frozen": {"grad_accum": 2, "prediction__freeze_context": True},
}  # fmt: skip
STAGES = {
    "fixed_point document": (0, 1, 3), "fixed_point log_det cosine": (0,), "fixed_point stream": (3,),
    "fixed_point circular by sweeps": (3,), "prediction document": (1, 3), "prediction stream": (0,),
    "prediction frozen": (2,),
}  # fmt: skip
EVALUATED = (("fixed_point stream", 3), ("prediction document", 3), ("prediction stream", 0))
"""Whose held-out numbers are compared too, which takes longer than all else."""
RUNS: dict[str, dict[str, Any]] = {
    "zero1": {"zero": "zero1", "grad_accum": 2},
    "zero3 bf16 stream": {"zero": "zero3", "precision": "bf16", "grad_accum": 1, "model__carry": "stream"},
    "zero2 fp16 frozen": {"zero": "zero2", "precision": "fp16", "grad_accum": 1, "prediction__freeze_context": True},
    "zero0 by the rule": {"zero": "zero0", "grad_accum": 1, "fixed_point__converged": 0.0, "epochs__evaluate": 1.0},
}
CONTROL = "control"
"""The folder of a run that is trained as the first of `RUNS`, its context held at zero."""
MIDDLES = {
    "in the first phase": 2, "where its rule ended it": 3, "after its rule ended it": 4, "in its second pass": 4,
    "at the switch": 6, "in the second phase": 8,
}  # fmt: skip
PLACES = {
    "zero1": ("in its second pass", "in the second phase"), "zero3 bf16 stream": ("in the first phase",),
    "zero2 fp16 frozen": ("at the switch", "in the second phase"),
    "zero0 by the rule": ("where its rule ended it", "after its rule ended it"),
}  # fmt: skip
FIRST, LAST = {"zero0 by the rule": 3}, 6
"""Steps: of two passes, or of one where the rule ends the phase after it; and of two epochs, of three steps each."""


def randomise(name: str, shape: torch.Size) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator_for(7, name))
    return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise


def with_data(config: RunConfig, topology: Topology) -> System[Any]:
    """The system of a config as a run of it has it."""
    system = create_system(config)
    system.files = system.list_data()
    return decide(system, topology).system


class Stepped:
    """A pass without any update, which leaves contexts behind, and one step of the next."""

    def __init__(self, system: System[Any], model: Any, module: Any, phase: Any, topology: Topology) -> None:
        self.system, self.model, self.topology, self.phase = system, model, topology, phase
        self.loader = system.loader(phase, topology)
        system.begin_phase(module, phase, SyncPoint(topology))
        self.begun = {name: value.clone() for name, value in module.named_buffers()}
        self.step = 0
        self.carries: list[Carry] = [{} for _ in range(system.config.grad_accum)]
        for _ in range(self.loader.slots):  # type: ignore[attr-defined]
            with torch.no_grad():
                self.forward(lambda loss: None)

    def forward(self, backward: Any) -> dict[str, float]:
        """The mean of each term."""
        self.step += 1
        batches = self.loader.next_step()
        counts = SyncPoint(self.topology)("step", counts=add_counts(map(self.system.count, batches)))
        terms: dict[str, float] = {}
        for micro, batch in enumerate(batches):
            context = StepContext(self.topology, self.system.config.seed, self.phase.name, self.step)
            output = self.system.forward(self.model, batch, self.carries[micro], context)
            backward(scaled_loss(output.sums, counts, self.topology))
            self.carries[micro] = output.carry
            for term, value in output.sums.items():
                terms[term] = terms.get(term, 0.0) + float(value.detach()) / max(1, counts[term])
        return terms


def _or_infinite(value: float) -> float:
    """NaN is larger than all other numbers."""
    return math.inf if math.isnan(value) else value


def gradients(out: Path, name: str, stage: int, zero: str, topology: Topology) -> dict[str, Any]:
    """The largest relative difference of a parameter's gradient, in the second pass, from that of one process without
    DeepSpeed that takes the step as one batch; of the statistics after it; and of the held-out numbers."""
    changes = MODELS[name]
    rows = ROWS // (topology.data * changes["grad_accum"])
    system = with_data(small(out, zero=zero, batch_size=rows, clip=0.0, **changes), topology)
    ds_config = deepspeed_config(system.config)
    with building(ds_config, torch.float32):
        model = system.build()
    system.initialise(model, topology)
    fill(model, randomise)
    phase = next(phase for phase in system.phases(model) if phase.name == name.split()[0])
    engine = Engine(model, phase, system.config, ds_config)
    run = Stepped(system, engine.deepspeed, engine.module, phase, topology)
    run.forward(engine.backward)
    trained = {name for group in phase.groups for name in group.parameters}
    found = {n: engine.gradient(p).clone() for n, p in engine.module.named_parameters() if n in trained}  # type: ignore[union-attr]
    system.after_step(engine.module, StepContext(topology, 0, phase.name, run.step))
    statistics = {name: value.clone() for name, value in engine.module.named_buffers()}
    evaluates = (name, stage) in EVALUATED
    held_out = system.evaluate(engine.deepspeed, phase, SyncPoint(topology)).scalars if evaluates else {}
    engine.step(1.0)
    moved: dict[str, float] = {}
    for parameter_name, parameter in engine.module.named_parameters():
        if parameter_name in trained:
            with gathered([parameter]):
                before = randomise(parameter_name, parameter.shape)
                moved[parameter_name] = float((parameter.detach().float() - before).abs().max())
    still = [parameter_name for parameter_name, most in moved.items() if not most > 0]

    alone = with_data(dataclasses.replace(system.config, batch_size=ROWS, grad_accum=1), Topology())
    plain = alone.build()
    with torch.no_grad():
        for parameter_name, parameter in plain.named_parameters():
            parameter.copy_(randomise(parameter_name, parameter.shape))
            parameter.requires_grad_(parameter_name in trained)
    other = Stepped(alone, plain, plain, phase, Topology())
    begun = max(float((run.begun[buffer] - value).abs().max()) for buffer, value in other.begun.items())
    for buffer, value in plain.named_buffers():
        # A log-determinant's gradient is an inverse: of the same numbers, not of those that differ by rounding.
        value.copy_(run.begun[buffer])
    other.forward(lambda loss: loss.backward())
    alone.after_step(plain, StepContext(Topology(), 0, phase.name, other.step))
    expected = {n: p.grad for n, p in plain.named_parameters() if n in trained}
    size = float(torch.nn.utils.get_total_norm([gradient for gradient in expected.values() if gradient is not None]))
    differences: dict[str, float] = {}
    for parameter_name, gradient in expected.items():
        assert gradient is not None, parameter_name
        difference = float((found[parameter_name] - gradient).norm())
        differences[parameter_name] = difference / max(float(gradient.norm()), 1e-3 * size)
    reference = alone.evaluate(plain, phase, SyncPoint(Topology())).scalars if evaluates else {}
    worst = max(differences, key=lambda key: _or_infinite(differences[key]))
    apart = {
        key: abs(held_out[key] - value) / max(abs(value), 1e-2)
        for key, value in reference.items()
        if abs(value) < float("inf")
    }
    worst_number = max(apart, key=lambda key: _or_infinite(apart[key]), default="")
    return {
        "parameter": worst,
        "gradient": differences[worst],
        "still": still,
        "least": min(float(gradient.norm()) for gradient in expected.values() if gradient is not None),
        "begun": begun,
        "statistics": max(float((statistics[buffer] - value).abs().max()) for buffer, value in plain.named_buffers()),
        "number": worst_number,
        "held out": apart[worst_number] if evaluates else None,
    }  # fmt: skip


def settings_of(changes: dict[str, Any]) -> dict[str, Any]:
    """Of a run on two ranks, with these changes."""
    rows = ROWS // (2 * changes["grad_accum"])
    return {"batch_size": rows, "save_every": 2, "epochs__save": 0.0, "epochs__evaluate": 3.0, **changes}


def resumed(out: Path, number: int, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """In what runs that go on from the middle of each phase, and from their border, differ from one in a piece."""
    settings = settings_of(changes)
    straight = out / f"straight{number}"
    train(small(out, output_dir=straight, **settings))
    found: dict[str, Any] = {}
    last = FIRST.get(name, 6) + LAST
    for place in PLACES[name]:
        step = MIDDLES[place]
        other = out / f"resumed{number}-{step}"
        train(small(out, output_dir=other, resume=str(straight / "checkpoints" / f"checkpoint-{step}"), **settings))
        if dist.get_rank() == 0:
            newest = [run / "checkpoints" / f"checkpoint-{last}" for run in (straight, other)]
            found[place] = unlike(*newest)
    if dist.get_rank() != 0:
        return {}
    rows_of = [row for row in read_rows(straight / "metrics.jsonl") if row["mode"] == "train"]
    return {
        "differences": found,
        "phases": [(row["phase"], row["phase_step"]) for row in rows_of],
        "epochs": [row["epoch"] for row in rows_of],
        "finite": all(row["loss"] == row["loss"] for row in rows_of),
    }


def tested(out: Path) -> dict[str, Any]:
    """What a run with --test leaves behind, and in what it differs, once it has gone on without it, from the first of
    `RUNS`."""
    run, settings = out / "tested", settings_of(RUNS["zero1"])

    def steps() -> list[tuple[str, int]]:
        if dist.get_rank() != 0:
            return []
        return [(row["phase"], row["step"]) for row in read_rows(run / "metrics.jsonl") if row["mode"] == "train"]

    train(small(out, output_dir=run, model__test=True, **settings))
    first = steps()
    train(small(out, output_dir=run, **settings))
    if dist.get_rank() != 0:
        return {}
    differences = unlike(*(folder / "checkpoints" / "checkpoint-12" for folder in (out / "straight0", run)))
    return {"first": first, "then": steps(), "differences": differences}


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    # Few CPUs say that they have float16; what training needs of it every one does.
    get_accelerator().is_fp16_supported = lambda: True
    topology = start(small(out))
    if topology.rank == 0:
        documents(out / "documents")
    dist.barrier()
    found: dict[str, Any] = {"gradients": {}, "resumed": {}}
    for name in MODELS:
        for stage in STAGES[name]:
            zero = everything_sharded(out, topology.rank) if stage == 3 else f"zero{stage}"
            found["gradients"][f"{name} zero{stage}"] = gradients(out, name, stage, zero, topology)
    for number, (name, changes) in enumerate(RUNS.items()):
        found["resumed"][name] = resumed(out, number, name, changes)
        dist.barrier()
    found["tested"] = tested(out)
    train(small(out, output_dir=out / CONTROL, prediction__context="zero", **settings_of(RUNS["zero1"])))
    if topology.rank == 0:
        (out / "result.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
