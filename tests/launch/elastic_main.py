"""Started by test_elastic.py on every rank: checkpoints of every ZeRO stage, loaded at every stage and precision.

Usage: elastic_main OUT save                        trains, saves and converts OUT/WORLD-PRECISION-KIND, also to .pt
       elastic_main OUT load WORLD-PRECISION ...    loads what WORLD ranks saved, at every stage
       elastic_main OUT save WORLD-PRECISION ...    both
Rank 0 writes OUT/load-RANKS.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from pipeline.checkpoint.universal import convert, load_universal
from pipeline.cli import exit_process, without_local_rank
from pipeline.config import RunConfig
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.precision import precision_of
from pipeline.runtime.ranks import start, stop
from pipeline.system import ParameterGroup, Phase
from tests.checkpoint.whole import write_whole
from tests.launch.harness import ROOT
from tests.launch.parity_main import base
from tests.launch.whole import full_state

STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")
PHASE = Phase(
    name="train",
    steps=10,
    groups=(
        ParameterGroup("matrices", ("inner.weight", "outer.weight", "scalar"), 1.0, 0.1),
        ParameterGroup("vectors", ("inner.bias", "outer.bias", "odd"), 0.3, 0.0),
    ),
)
TRAINED = [name for group in PHASE.groups for name in group.parameters]
STAGES = ("zero0", "zero1", "zero2", "zero3")
"""ds_configs; of zero3 every parameter is sharded, in sub-groups of 40."""
OTHERS = ("zero1-float32-sums", "zero2-offload", "zero3-persistent", "zero3-offload")
"""BF16_Optimizer (with bfloat16), zero2 on the CPU, zero3 as it is, and on the CPU."""
Values = dict[str, dict[str, Tensor]]


class Toy(nn.Module):
    """Sizes that no number of ranks divides, one below any, a frozen part, a buffer that the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 8)
        self.inner = nn.Linear(8, 7)
        self.outer = nn.Linear(7, 5)
        self.scalar = nn.Parameter(torch.ones(1))
        self.odd = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(self.frozen(x)))
        return (self.outer(hidden) * self.scalar * self.scale[0]).sum() + (self.odd**2).sum()


def settings(kind: str, out: Path, rank: int) -> str:
    """What `--zero` says for one of STAGES and OTHERS."""
    if kind in STAGES[:3]:
        return kind
    content = json.loads((ROOT / "ds_configs" / f"{kind[:5]}.json").read_text())
    zero = content["zero_optimization"]
    if kind == "zero1-float32-sums":
        content["data_types"] = {"grad_accum_dtype": "fp32"}
    elif kind in ("zero3", "zero3-offload"):
        zero["stage3_param_persistence_threshold"] = 0
        zero["sub_group_size"] = 40
    if kind.endswith("offload"):
        content["zero_force_ds_cpu_optimizer"] = False
        zero["offload_optimizer"] = {"device": "cpu"}
    if kind == "zero3-offload":
        zero["offload_param"] = {"device": "cpu"}
    path = out / f"{kind}-{rank}.json"
    path.write_text(json.dumps(content))
    return str(path)


def build(kind: str, precision: str, out: Path, topology: Topology) -> tuple[Engine, RunConfig]:
    zero = settings(kind, out, topology.rank)
    config = dataclasses.replace(base(), zero=zero, precision=precision, grad_accum=1, lr=0.05, batch_size=1)
    ds_config = deepspeed_config(config)
    torch.manual_seed(0)
    with building(ds_config, precision_of(config)):
        model = Toy()
    return Engine(model, PHASE, config, ds_config), config


def step(engine: Engine, config: RunConfig, number: int) -> None:
    """An update whose gradients are the same on any number (a power of 2) of ranks: all see the same row."""
    row = torch.randn(2, 4, generator=torch.Generator().manual_seed(number)).to(precision_of(config))
    engine.backward(engine.deepspeed(row))
    engine.step(1.0)


def owners(engine: Engine) -> dict[str, tuple[Tensor, Mapping[Any, Any]]]:
    """Without ZeRO: the float32 weight of each trained parameter and the optimizer's state."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        masters, state = [p for group in optimizer.fp32_groups for p in group], optimizer.optimizer.state
    else:
        masters, state = [p for group in optimizer.param_groups for p in group["params"]], optimizer.state
    return {name: (master, state) for name, master in zip(TRAINED, masters, strict=True)}


def values(engine: Engine) -> Values:
    """Masters and moments, whole, by DeepSpeed's own reading functions. Collective."""
    named = dict(engine.module.named_parameters())
    zero = hasattr(named[TRAINED[0]], "ds_id") or hasattr(named[TRAINED[0]], "_hp_mapping")
    if hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        # DeepSpeed links a parameter to its moments after the first group's first update: of that group alone.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: Values = {}
    for name in TRAINED:
        if zero:
            parts = [safe_get_full_fp32_param(named[name])]
            parts += [safe_get_full_optimizer_state(named[name], kind) for kind in MOMENTS]
        else:
            master, state = owners(engine)[name]
            parts = [master, *(state[master][kind] for kind in MOMENTS)]
        shape = getattr(named[name], "ds_shape", named[name].shape)
        whole = [part.detach().float().reshape(shape).clone() for part in parts]
        found[name] = dict(zip(("fp32", *MOMENTS), whole, strict=True))
    return found


def counted(engine: Engine) -> set[float]:
    """Every step that the optimizer counts on this rank."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return {float(state["step"]) for state in inner.state.values()}


def save(out: Path, topology: Topology, kind: str, precision: str) -> None:
    engine, config = build(kind, precision, out, topology)
    for number in range(STEPS):
        step(engine, config, number)
    dict(engine.module.named_buffers())["scale"].fill_(1.25)
    folder = out / f"{topology.world}-{precision}-{kind}"
    for path, content in engine.collect(out, folder.name).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    torch.distributed.barrier()
    facts = {"world": topology.world, "zero_stage": engine.stage, "step": STEPS}
    if topology.rank == 0:
        (folder / "trainer_state.json").write_text("{}")
        write_whole(folder, facts)
        convert(folder, folder.with_name(f"{folder.name}.universal"))
    truth = {"values": values(engine), "steps": counted(engine), "samples": engine.deepspeed.global_samples}
    truth["layout"] = engine.layout
    step(engine, config, STEPS)
    truth["next"] = values(engine)
    if topology.rank == 0:
        torch.save(truth, folder.with_suffix(".pt"))
    torch.distributed.barrier()


def load(out: Path, topology: Topology, source: str, kind: str, precision: str) -> dict[str, bool]:
    """What holds of an engine that took a checkpoint of another layout."""
    engine, config = build(kind, precision, out, topology)
    load_universal(engine, out / f"{source}.universal", topology)
    truth = torch.load(out / f"{source}.pt", weights_only=True)
    loaded = values(engine)
    weights = full_state(engine.module, TRAINED)
    facts = {
        "masters and moments are equal": all(
            torch.equal(loaded[name][key], value)
            for name, kept in truth["values"].items()
            for key, value in kept.items()
        ),
        "weights are the rounded masters": all(
            torch.equal(weight, truth["values"][name]["fp32"].to(weight.dtype)) for name, weight in weights.items()
        ),
        "steps are equal": counted(engine) == truth["steps"],
        "the groups keep their own": [
            (group["weight_decay"], group["betas"], group["eps"], group["name"])
            for group in engine.optimizer.param_groups
        ]
        == [(g.weight_decay, config.optimizer.betas, config.optimizer.eps, g.name) for g in PHASE.groups],
        "counters": (engine.deepspeed.global_steps, engine.deepspeed.global_samples) == (STEPS, truth["samples"]),
        "buffers": dict(engine.module.named_buffers())["scale"].tolist() == [1.25, 1.25],
    }
    step(engine, config, STEPS)
    after = values(engine)
    facts["the next update is the same"] = all(
        torch.allclose(after[name][key], value, rtol=1e-6, atol=1e-6)
        for name, kept in truth["next"].items()
        for key, value in kept.items()
    )
    return facts


def refusals(out: Path, topology: Topology, source: str) -> dict[str, bool]:
    """What does not fit is refused on every rank, before anything is changed."""
    found = {}
    for case, groups, reason in (
        ("another model", (ParameterGroup("all", (*TRAINED, "frozen.weight")),), "has no state of 'frozen.weight'"),
        ("a frozen part", (ParameterGroup("all", tuple(TRAINED[1:])),), "is frozen in this run"),
    ):
        config = dataclasses.replace(base(), zero="zero1", batch_size=1)
        ds_config = deepspeed_config(config)
        with building(ds_config, torch.float32):
            model = Toy()
        engine = Engine(model, dataclasses.replace(PHASE, groups=groups), config, ds_config)
        before = full_state(model, TRAINED)
        try:
            load_universal(engine, out / f"{source}-zero1.universal", topology)
        except UserError as error:
            same = all(torch.equal(before[name], value) for name, value in full_state(model, list(before)).items())
            found[case] = reason in str(error) and same
        else:
            found[case] = False
    return found


def main() -> None:
    folder, job, *sources = without_local_rank(sys.argv[1:])
    out = Path(folder)
    topology = start(base())
    if job == "save":
        for precision in ("fp32", "bf16"):
            for kind in STAGES + OTHERS:
                save(out, topology, kind, precision)
    pairs = [(source, kind) for source in STAGES for kind in STAGES]
    # Four ranks on two cores take their time.
    if topology.world < 4:
        pairs += [(other, "zero0") for other in OTHERS] + [("zero1", other) for other in OTHERS]
    found: dict[str, dict[str, bool]] = {}
    for source in sources:
        for saved, kind in pairs:
            name = f"{source}-{saved}"
            found[f"{name} -> {kind}"] = load(out, topology, name, kind, source.partition("-")[2])
    if sources:
        found["refusals"] = refusals(out, topology, sources[0])
        if topology.rank == 0:
            (out / f"load-{topology.world}.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
