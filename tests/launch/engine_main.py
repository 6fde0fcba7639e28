"""Started by test_engine.py on every rank: values that are not finite, time limits, weights of a folder.

Usage: engine_main OUT. Rank 0 writes OUT/result.json.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from transformers import Olmo2ForCausalLM

from pipeline.cli import without_local_rank
from pipeline.config import RunConfig
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.errors import UserError
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.precision import precision_of
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import HEARTBEAT_MARGIN, start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext
from pipeline.systems.miras import create
from tests.launch.loss_scales import loss_scales
from tests.launch.parity_main import ROWS, base, micro_batches
from tests.launch.whole import full_state


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return full_state(engine.module, [name for name, _ in engine.module.named_parameters()])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def skips(config: RunConfig, topology: Topology) -> dict[str, bool]:
    """Three updates: a good one, one whose loss is infinite on the last rank alone, a good one."""
    system = create(config)
    config = dataclasses.replace(config, batch_size=ROWS // topology.data)
    ds_config = deepspeed_config(config)
    with building(ds_config, precision_of(config)):
        model = system.build()
    system.initialise(model, topology)
    (phase,) = system.phases(model)
    engine = Engine(model, phase, config, ds_config)
    if engine.loss_scale is not None:
        engine.loss_scale.load({"cur_scale": 64.0})  # low enough for the good ones
    untouched = starts_untouched(engine)
    batches = micro_batches(topology, config.grad_accum)
    history = []
    for step in range(1, 4):
        before = weights(engine)
        counts = SyncPoint(topology)("step 1", counts=add_counts(map(system.count, batches)))
        for batch in batches:
            output = system.forward(engine.deepspeed, batch, {}, StepContext(topology, 0, "train", step))
            sums = dict(output.sums)
            if step == 2 and topology.rank == topology.world - 1:
                sums["cross_entropy"] = sums["cross_entropy"] * torch.inf
            engine.backward(scaled_loss(sums, counts, topology))
        result = engine.step(1.0)
        history.append((result.skipped, same(before, weights(engine))))
    return {
        "good updates are made": [history[0], history[2]] == [(False, False)] * 2 if topology.rank == 0 else True,
        "the bad one is skipped on every rank": history[1][0],
        "and changes no weight": history[1][1],
        "no update was made before the first": untouched,
    }


def starts_untouched(engine: Engine) -> bool:
    """Whether the float32 masters, where they are apart from the weights, equal them, and no update is counted."""
    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return True
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    equal = all(torch.equal(w.float(), m) for weights, masters in pairs for w, m in zip(weights, masters, strict=True))
    return equal and not any(float(state["step"]) for state in engine.optimizer.optimizer.state.values())


def pretrained(topology: Topology, folder: Path, stage: int) -> bool:
    """Whether a sharded backbone holds the weights of a folder that transformers wrote."""
    config = base(trainable=False)
    backbone = dataclasses.replace(config.model.backbone, pretrained=str(folder))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, backbone=backbone), zero=f"zero{stage}"
    )
    system = create(config)
    with building(deepspeed_config(config), torch.float32):
        model = system.build()
    system.initialise(model, topology)
    found = full_state(model, [name for name, _ in model.named_parameters()])
    expected = Olmo2ForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(found[f"backbone.{name}"], value) for name, value in expected.items()) if found else True


def time_limits(config: RunConfig) -> dict[str, bool]:
    """Whether every process group, DeepSpeed's own too, waits longer than the heartbeat, which names the rank."""
    limit = datetime.timedelta(minutes=config.parallel.timeout_minutes) + HEARTBEAT_MARGIN
    groups = torch.distributed.distributed_c10d._world.pg_map
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    return {"there are several": len(found) > 1, "all have the run's": set(found) == {limit}}


def agreement(topology: Topology) -> dict[str, bool]:
    """Whether a problem that the last rank alone has is raised on this one with its text."""
    try:
        with shared_errors(topology):
            if topology.rank == topology.world - 1:
                raise UserError("this node has no such folder")
    except UserError as error:
        return {"all stop with the same reason": str(error) == "this node has no such folder"}
    return {"all stop": False}


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    topology = start(base())
    found: dict[str, object] = {}
    # Few CPUs say that they have float16; what training needs of it every one does.
    get_accelerator().is_fp16_supported = lambda: True
    for precision in ("fp32", "bf16", "fp16"):
        for stage in range(4):
            config = dataclasses.replace(
                base(), zero=f"zero{stage}", precision=precision, grad_accum=2, lr=0.1, weight_decay=0.1
            )
            found[f"{precision} zero{stage}"] = skips(config, topology)
    found |= loss_scales(out, topology)
    found["time limits"] = time_limits(base())
    found["agreement"] = agreement(topology)
    # Engines of every stage were made, and nothing was compiled.
    found["start"] = {"without torch's compiler": "torch._inductor.compile_fx" not in sys.modules}
    folder = out / "backbone"
    if topology.rank == 0:
        system = create(base())
        with torch.random.fork_rng():
            Olmo2ForCausalLM(system.backbone).save_pretrained(folder)  # type: ignore[attr-defined]
    torch.distributed.barrier()
    found["pretrained"] = {f"zero{stage}": pretrained(topology, folder, stage) for stage in (0, 3)}
    if topology.rank == 0:
        (out / "result.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
