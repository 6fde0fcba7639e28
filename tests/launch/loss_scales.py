"""The loss scale at every ZeRO stage: an overflow, a save, a resume, a conversion. Part of engine_main.

DeepSpeed asks the device whether it has float16, and few CPUs say so: the caller answers for it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pipeline.checkpoint.universal import convert, load_universal
from pipeline.engine import Engine, StepResult
from pipeline.loss_scale import KEYS
from pipeline.parallel.loss import scaled_loss
from pipeline.parallel.topology import Topology
from tests.checkpoint.whole import write_whole
from tests.launch.elastic_main import STAGES, TRAINED, Toy, build, values
from tests.launch.whole import full_state

KINDS = (*STAGES, "zero2-offload")
COUNT = 10
"""What the loss averages over."""
OVERFLOWS = 1e6
"""A factor with which a loss is finite, and its gradient in float16 is not."""


def row(number: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(number)).half()


def update(engine: Engine, topology: Topology, number: int, factor: float = 1.0) -> StepResult:
    """An update whose loss is `factor` times the others' on the last rank."""
    output = engine.deepspeed(row(number))
    factor = factor if topology.rank == topology.world - 1 else 1.0
    engine.backward(scaled_loss({"loss": output.float() * factor}, {"loss": COUNT}, topology))
    return engine.step(1.0)


def state(engine: Engine) -> dict[str, float]:
    """All that changes of the scale, as DeepSpeed's optimizer has it."""
    holder = getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler
    return {key: getattr(holder, key) for key in KEYS if hasattr(holder, key)}


def expected_norm(weights: dict[str, torch.Tensor], topology: Topology) -> float:
    """Of the gradients of one device in float32, from the weights in float16."""
    torch.manual_seed(0)
    model = Toy()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    (model(row(0).float()) * topology.world / COUNT).backward()
    gradients = [named[name].grad for name in TRAINED]
    return float(torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None]))


def same(one: Engine, other: Engine) -> bool:
    """Whether the masters and the moments of two engines have the same bits. Collective."""
    a, b = values(one), values(other)
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


def saved(engine: Engine, folder: Path, topology: Topology) -> None:
    """A checkpoint of what DeepSpeed writes, and a universal one beside it."""
    for path, content in engine.collect(folder.parent, folder.name).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    torch.distributed.barrier()
    if topology.rank == 0:
        (folder / "trainer_state.json").write_text("{}")
        write_whole(folder, {"world": topology.world, "zero_stage": engine.stage, "step": 2})
        convert(folder, folder.with_name(f"{folder.name}.universal"))
    torch.distributed.barrier()


def of_a_stage(kind: str, out: Path, topology: Topology) -> dict[str, bool]:
    engine, _ = build(kind, "fp16", out, topology)
    assert engine.loss_scale is not None
    facts = {
        "it begins at 2 ** 16": engine.loss_scale.value == 2**16,
        "it is another layout than bfloat16": engine.layout["optimizer"].endswith(", fp16"),
    }
    engine.loss_scale.load({"cur_scale": 1024.0})
    before = full_state(engine.module, [name for name, _ in engine.module.named_parameters()])
    good = update(engine, topology, 0)
    after = full_state(engine.module, TRAINED)
    facts["an update without overflow is made"] = not good.skipped and good.loss_scale == 1024
    if topology.rank == 0:
        facts["and changes weights"] = not all(torch.equal(before[name], after[name]) for name in TRAINED)
        facts["the norm is unscaled"] = math.isclose(good.grad_norm, expected_norm(before, topology), rel_tol=5e-3)
    bad = update(engine, topology, 1, OVERFLOWS)
    now = full_state(engine.module, TRAINED)
    facts["an overflow of one rank skips on every rank"] = bad.skipped and math.isnan(bad.grad_norm)
    facts["and changes no weight"] = all(torch.equal(after[name], now[name]) for name in after)
    facts["and halves the scale"] = bad.scale_was_lowered and (bad.loss_scale, engine.loss_scale.value) == (1024, 512)
    saved(engine, out / f"fp16-{kind}", topology)

    again, _ = build(kind, "fp16", out, topology)
    assert again.loss_scale is not None
    again.load(out / f"fp16-{kind}")
    facts["a resume keeps the scale and its counters"] = (
        state(again) == state(engine) and state(again)["last_overflow_iter"] == 1 and state(again)["cur_iter"] == 2
    )
    holder = getattr(again.optimizer, "loss_scale_config", None) or again.optimizer.loss_scaler
    holder.scale_window = 1
    results = [update(one, topology, number) for number in (2, 3) for one in (engine, again)]
    facts["the scale grows after a window without overflow"] = [result.loss_scale for result in results] == [
        512
    ] * 4 and (engine.loss_scale.value, again.loss_scale.value) == (512, 1024)
    facts["the update at which it grows is as large as without"] = same(engine, again)
    facts["and so is its norm"] = results[2].grad_norm == results[3].grad_norm

    engine.loss_scale.load({"cur_scale": 1.0})
    worst = update(engine, topology, 4, math.nan)
    facts["a NaN at the least scale is no overflow"] = worst.skipped and not worst.scale_was_lowered
    facts["and the scale stays"] = engine.loss_scale.value == 1 and state(engine)["last_overflow_iter"] == 4
    return facts


def converted(source: str, kind: str, out: Path, topology: Topology) -> dict[str, bool]:
    """What holds of an engine of one stage that takes the checkpoint of another."""
    first, _ = build(source, "fp16", out, topology)
    first.load(out / f"fp16-{source}")
    second, _ = build(kind, "fp16", out, topology)
    load_universal(second, out / f"fp16-{source}.universal", topology)
    kept = {key: value for key, value in state(first).items() if key in state(second)}
    return {
        "scale and counters are kept": len(kept) >= 3 and {**state(second), **kept} == state(second),
        "masters and moments are kept": same(first, second),
        "the next update is made": not update(second, topology, 2).skipped,
    }


def elsewhere(out: Path, topology: Topology) -> dict[str, bool]:
    """Between float16 and precisions without a loss scale."""
    for_bf16, _ = build("zero2", "bf16", out, topology)
    load_universal(for_bf16, out / "fp16-zero1.universal", topology)
    saved(for_bf16, out / "fp16-from-bf16", topology)
    back, _ = build("zero1", "fp16", out, topology)
    load_universal(back, out / "fp16-from-bf16.universal", topology)
    return {
        "bfloat16 has none": for_bf16.loss_scale is None,
        "from bfloat16 it begins anew": back.loss_scale is not None and back.loss_scale.value == 2**16,
    }


def offloaded(out: Path, topology: Topology) -> dict[str, bool]:
    """In bfloat16, which has no scale, with the optimizer's state in host memory."""
    engine, _ = build("zero2-offload", "bf16", out, topology)
    skipped = []
    for number, factor in enumerate((1.0, math.nan, 1.0)):
        output = engine.deepspeed(row(number).bfloat16())
        engine.backward(scaled_loss({"loss": output.float() * factor}, {"loss": COUNT}, topology))
        skipped.append(engine.step(1.0).skipped)
    return {"the update after a skipped one is made": skipped == [False, True, False]}


def loss_scales(out: Path, topology: Topology) -> dict[str, dict[str, bool]]:
    """Every stage, and conversions from and to each. Collective."""
    found = {f"scale {kind}": of_a_stage(kind, out, topology) for kind in KINDS}
    for source, kind in zip(STAGES, (*STAGES[1:], STAGES[0]), strict=True):
        found[f"scale {source} -> {kind}"] = converted(source, kind, out, topology)
    found["scale elsewhere"] = elsewhere(out, topology)
    found["skip with offload"] = offloaded(out, topology)
    return found
