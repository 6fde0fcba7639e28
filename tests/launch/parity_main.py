"""Started by test_parity.py on every rank: gradients of one optimizer step, for every ZeRO stage and accumulation.

Usage: parity_main OUT SEQUENCE_DEGREE. Rank 0 writes OUT/CASE.pt with the full gradients, their norm and the losses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.capabilities import ClosesGap
from pipeline.cli import without_local_rank
from pipeline.config import ParallelConfig, RunConfig
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.downstream import system_scorer
from pipeline.downstream.requests import Likelihood, Request
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.errors import UserError
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.parallel.collectives import all_gather_object
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill, generator_for
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Phase, StepContext, create_system
from pipeline.systems.miras.config import DistillationConfig, MemoryConfig, MirasConfig
from pipeline.systems.miras.rule_config import SlotsConfig
from tests.launch.harness import ROOT
from tests.launch.olmo_cases import MODELS, STEPS, olmo, updates

ROWS = 2
LENGTH = 48
VOCABULARY = 64
ACCUMULATIONS = (1, 3)
CONTEXT = 7
"""Tokens of a segment of mac: not a divisor of the sequence."""
ATTACHED = [(attachment, stage) for attachment in ("mal", "mag", "mac", "overflow", "slots") for stage in (1, 3)]
"""Attachments and ZeRO stages; stage 3 with recomputation, and with every parameter sharded, however small."""
RULES = [("mac", "mlp"), ("residual", "yaad")]
"""Attachments of rules that have parameters of their own, as stage 3 above."""

FOUR_RANKS = {
    4: (
        "zero1-accum3", "zero3-accum3", "full-zero1", "frozen-recomputed-zero3", "mal-zero1", "mag-zero3", "mac-zero1",
        "overflow-zero3", "slots-zero1", "mac-mlp-zero3", "residual-yaad-zero3", "overflow-beside-mac",
        "distilled-zero2", "olmo-zero0", "olmo2-zero3", "offload",
    ),
    2: (
        "zero0-accum3", "zero2-accum3", "full-zero1", "frozen-recomputed-zero0", "mal-zero3", "mag-zero1", "mac-zero3",
        "overflow-zero1", "slots-zero3", "mac-mlp-zero3", "residual-yaad-zero3", "overflow-beside-mac",
        "distilled-zero3", "olmo-zero1", "olmo2-zero2", "offload",
    ),
}  # fmt: skip
"""The cases of four ranks, by sequence degree. What two ranks, that share sequences or rows, do in every case, four do
in one of each kind, and in every stage at least once: parts that have parts on both sides, and sequences and rows that
are shared at once, differ from two ranks by the kind of work and by the stage, and not by their combinations. Where a
kind has several stages, the two layouts take different ones."""
GAPS = ("residual", "mac", "overflow", "slots")
"""Attachments whose gap closed is measured, with every parameter sharded but for mac: data ranks with other documents
have other numbers of stages of it, which ZeRO-3 would find out."""
FOUR_RANKS_GAPS = {4: ("residual", "overflow"), 2: ("mac", "slots")}
"""Those of four ranks, by sequence degree; each is measured with sequences and with rows divided by two ranks."""
GAP_ROWS = 4
"""Streams that it is measured on, with eleven documents beyond the window: three groups that swap."""
GAP_STEPS = 2


def base(kind: str = "window", *, trainable: bool = True, layers: int = 3) -> RunConfig:
    """A model with every part in it, small enough for a launch."""
    return RunConfig(
        recipe="parity",
        model=MirasConfig(
            backbone=BackboneConfig(
                trainable=trainable, layers=layers, width=32, heads=4, kv_heads=4, ffn=48, vocabulary=VOCABULARY,
                rope_theta=100.0,
            ),
            attention=AttentionConfig(kind=kind, window=10, sinks=2),
            memory=MemoryConfig(layers=(1, 2), heads=4, head_dim=8, chunk=16, persistent=3, gate_rank=4),
        ),
        steps=1, batch_size=ROWS, sequence_length=LENGTH, lr=1e-3, clip=0.0,
    )  # fmt: skip


def distillation(stage: int) -> RunConfig:
    """`base` with the backbone's full attention as its teacher and every loss term, by the ZeRO stage it is run in."""
    config = base(trainable=False)
    assert isinstance(config.model, MirasConfig)
    settings = DistillationConfig(
        kl=0.8, cross_entropy=0.3, hidden=0.5, attention=0.4, tokens=0 if stage == 1 else 11,
        lower_layers="window" if stage == 2 else "full",
    )  # fmt: skip
    model = dataclasses.replace(config.model, distil="full", distillation=settings)
    return dataclasses.replace(config, model=model, grad_accum=2, zero=f"zero{stage}")


def attached(attachment: str, kind: str = "window", *, rule: str = "titans", **options: Any) -> RunConfig:
    """`base` with the memory attached in another way, or another rule."""
    config = base(kind, **options)
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(
        config.model.memory, attachment=attachment, context=CONTEXT, rule=rule, gradient_chunk=5,
        slots=SlotsConfig(count=8, chunk=4, reach=14, importance=True),
    )  # fmt: skip
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


def mixed() -> RunConfig:
    """`overflow` on layer 2 beside `mac` on layer 1, and a penalty on writing."""
    config = attached("mac")
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, overflow_layers=(2,), write_penalty=0.1)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


def small_olmo(kind: str, **changes: Any) -> RunConfig:
    """A model of the olmo system on the batches of this module."""
    return olmo(kind, rows=ROWS, length=LENGTH, vocabulary=VOCABULARY, **changes)


def randomise(name: str, shape: torch.Size) -> torch.Tensor:
    """Nothing is zero: gates, output projections and norms included."""
    noise = torch.randn(shape, generator=generator_for(7, name))
    if name.endswith(("norm.weight", "layernorm.weight", "head_norm", "context_norm")):
        return 1 + 0.3 * noise
    return noise * (0.3 if len(shape) > 1 else 0.7)


def rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Packed rows whose counted labels differ a lot in number, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(count):
        tokens = torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)
        starts = torch.zeros(LENGTH, dtype=torch.int64)
        starts[torch.randperm(LENGTH - 1, generator=generator)[: index % 4] + 1] = 1
        segments = starts.cumsum(0)
        positions = torch.arange(LENGTH)
        positions = positions - torch.where(starts == 1, positions, 0).cummax(0).values
        labels = tokens[1:].clone()
        labels[:-1][segments[1:] != segments[:-1]] = IGNORED
        # Row 0 keeps nearly all labels, later ones ever fewer, and the second half of the sequence fewest.
        drop = torch.rand(LENGTH, generator=generator) < (index / count) * torch.linspace(0.5, 1.5, LENGTH)
        labels[drop] = IGNORED
        result.append({"input_ids": tokens[:-1], "labels": labels, "segment_ids": segments, "positions": positions})
    return result


def micro_batches(topology: Topology, accumulation: int) -> list[TokenBatch]:
    """This data rank's part of ROWS * accumulation rows, whatever the layout."""
    per_rank = ROWS // topology.data
    everything = rows(ROWS * accumulation)
    batches = []
    for micro in range(accumulation):
        first = (topology.data_rank * accumulation + micro) * per_rank
        part = everything[first : first + per_rank]
        stacked = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        batches.append(TokenBatch(**stacked, streams=torch.arange(first, first + per_rank)))
    return batches


def batches_of_steps(topology: Topology, steps: int) -> tuple[list[list[TokenBatch]], list[TokenBatch]]:
    """By step, this data rank's micro-batches of two rows in all, and the same of all ranks as one batch."""
    mine, everything = [], []
    for step in range(steps):
        part = rows(ROWS, seed=100 + step)
        first = topology.data_rank * (ROWS // topology.data)
        own = part[first : first + ROWS // topology.data]
        mine.append([_stacked([row], first + index) for index, row in enumerate(own)])
        everything.append(_stacked(part, 0))
    return mine, everything


def _stacked(part: list[dict[str, torch.Tensor]], first: int) -> TokenBatch:
    columns = {key: torch.stack([row[key] for row in part]) for key in part[0]}
    return TokenBatch(**columns, streams=torch.arange(first, first + len(part)))


def everything_sharded(folder: Path, rank: int) -> str:
    """The path of zero3 without its exception for small parameters, which here would be all of them."""
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero3-everything-{rank}.json"
    path.write_text(json.dumps(settings))
    return str(path)


def cases(sharded: str) -> list[tuple[str, RunConfig]]:
    """Names and configs; `sharded` is a ZeRO-3 file that shards everything."""
    found = []
    for accumulation in ACCUMULATIONS:
        for stage in range(4):
            config = dataclasses.replace(base(), grad_accum=accumulation, zero=f"zero{stage}")
            found.append((f"zero{stage}-accum{accumulation}", config))
    found.append(("full-zero1", dataclasses.replace(base("full"), zero="zero1")))
    for stage in (0, 3):
        frozen = dataclasses.replace(base(trainable=False), zero=f"zero{stage}", activation_checkpointing=True)
        found.append((f"frozen-recomputed-zero{stage}", frozen))
    for attachment, stage in ATTACHED:
        zero = sharded if stage == 3 else f"zero{stage}"
        config = dataclasses.replace(attached(attachment), zero=zero, activation_checkpointing=stage == 3)
        found.append((f"{attachment}-zero{stage}", config))
    for attachment, rule in RULES:
        config = dataclasses.replace(attached(attachment, rule=rule), zero=sharded, activation_checkpointing=True)
        found.append((f"{attachment}-{rule}-zero3", config))
    found.append(("overflow-beside-mac", dataclasses.replace(mixed(), zero="zero2", activation_checkpointing=True)))
    for stage in range(4):
        config = dataclasses.replace(distillation(stage), activation_checkpointing=stage == 3)
        found.append((f"distilled-zero{stage}", dataclasses.replace(config, zero=sharded) if stage == 3 else config))
    for kind in MODELS:
        for stage in range(4):
            zero = sharded if stage == 3 and kind == "olmo2" else f"zero{stage}"
            found.append((f"{kind}-zero{stage}", small_olmo(kind, zero=zero, grad_accum=2)))
    found.append(("offload", dataclasses.replace(base(), zero="zero3_offload")))
    return found


def run_case(config: RunConfig, topology: Topology) -> dict[str, object]:
    system = create_system(config)
    ds_config = deepspeed_config(dataclasses.replace(config, batch_size=ROWS // topology.data))
    with building(ds_config, torch.float32):
        model = system.build()
    try:
        system.initialise(model, topology)
    except UserError as error:
        return {"refused": str(error)}
    fill(model, randomise)
    (phase,) = system.phases(model)
    engine = Engine(model, phase, config, ds_config)
    batches = micro_batches(topology, config.grad_accum)
    counts = SyncPoint(topology)("step 1", counts=add_counts(map(system.count, batches)))
    context = StepContext(topology, 0, "train", 1)
    losses = []
    for batch in batches:
        output = system.forward(engine.deepspeed, batch, {}, context)
        losses.append(output.tokens["losses"])
        engine.backward(scaled_loss(output.sums, counts, topology))
    gradients = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            gradient = engine.gradient(parameter)
            gradients[name] = None if gradient is None else gradient.detach().clone().float()
    frozen = [name for name, p in engine.module.named_parameters() if not p.requires_grad and p.grad is not None]
    result = engine.step(1.0)
    return {"gradients": gradients, "norm": result.grad_norm, "losses": gather(losses, topology), "frozen": frozen}


def plain_gradients(config: RunConfig) -> dict[str, object]:
    """The same step in plain PyTorch, without DeepSpeed: the gradient of each term's sum / count, added up."""
    system = create_system(config)
    with building({}, torch.float32):
        model = system.build()
    fill(model, randomise)
    trained = {name for phase in system.phases(model) for group in phase.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    batches = micro_batches(Topology(), config.grad_accum)
    counts = add_counts(map(system.count, batches))
    for batch in batches:
        output = system.forward(model, batch, {}, StepContext(Topology(), 0, "train", 1))
        torch.stack([value / counts[term] for term, value in output.sums.items()]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if name in trained}
    return {"gradients": gradients, "norm": float(torch.nn.utils.get_total_norm(gradients.values()))}


def gather(losses: list[torch.Tensor], topology: Topology) -> torch.Tensor:
    """Per-token losses [rows, LENGTH] of the whole batch, in the order of the rows."""
    mine = torch.stack(losses).flatten(0, 1)
    if topology.world == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(topology.world)]
    dist.all_gather(parts, mine.contiguous())
    degree = topology.sequence
    groups = [torch.cat(parts[start : start + degree], dim=1) for start in range(0, topology.world, degree)]
    return torch.cat(groups)


def causality(config: RunConfig, topology: Topology) -> dict[str, float]:
    """Largest change of an allowed-to-be-unchanged loss when one input token changes; a row for each such token."""
    system = create_system(config)
    with building({}, torch.float32):
        model = system.build()
    fill(model, randomise)
    row = rows(ROWS)[1]
    boundary = int((row["segment_ids"] == 0).sum())
    same = {key: value.expand(LENGTH, -1) for key, value in row.items()}
    ids, changed = same["input_ids"], (same["input_ids"] + torch.eye(LENGTH, dtype=torch.int64)) % VOCABULARY

    def losses(ids: torch.Tensor) -> torch.Tensor:
        stacked = {**same, "input_ids": ids, "labels": torch.ones_like(ids)}
        batch = TokenBatch(**stacked, streams=torch.arange(LENGTH))
        with torch.no_grad():
            output = system.forward(model, batch, {}, StepContext(topology, 0, "train", 1))
        # Every data rank has all of the rows.
        return gather([output.tokens["losses"]], topology)[:LENGTH]

    # Row by row: a kernel may round the same numbers otherwise in another row.
    change = (losses(changed) - losses(ids)).abs()
    return {
        "earlier": float(change.tril(-1).max()),
        "other_document": float(change[:boundary, boundary:].max()),
        "least_own_change": float(change.diagonal().min()),
    }


class HeldOut:
    """Packed rows of documents of uneven lengths, in steps of LENGTH tokens: this data rank's streams of GAP_ROWS."""

    def __init__(self, topology: Topology) -> None:
        generator = torch.Generator().manual_seed(11)
        per_rank = GAP_ROWS // topology.data
        self.streams = torch.arange(GAP_ROWS)[topology.data_rank * per_rank : (topology.data_rank + 1) * per_rank]
        self.columns: list[torch.Tensor] = []
        everything = []
        for row in range(GAP_ROWS):
            sizes = torch.tensor([40 + 5 * row, 5, 9 + row, GAP_STEPS * LENGTH - 54 - 6 * row])
            ids = torch.randint(VOCABULARY, (GAP_STEPS * LENGTH,), generator=generator)
            segments = torch.arange(4).repeat_interleave(sizes)
            positions = torch.cat([torch.arange(int(size)) for size in sizes])
            labels = torch.cat([ids[1:], ids[:1]])
            labels[sizes.cumsum(0) - 1] = IGNORED
            everything.append((ids, labels, segments, positions))
        self.columns = [torch.stack(parts)[self.streams] for parts in zip(*everything, strict=True)]
        self.step = 0

    def next_step(self) -> list[TokenBatch]:
        here = slice(self.step * LENGTH, (self.step + 1) * LENGTH)
        self.step += 1
        return [TokenBatch(*(column[:, here] for column in self.columns), self.streams)]


def gap(attachment: str, topology: Topology, zero: str) -> dict[str, float]:
    """The scalars of gap closed, of a sharded model: documents are dealt to the data ranks."""
    config = attached(attachment)
    assert isinstance(config.model, MirasConfig)
    attention = dataclasses.replace(config.model.attention, window=8)
    evaluation = dataclasses.replace(config.evaluation, steps=GAP_STEPS, batch_size=3, full_length=50)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=attention), evaluation=evaluation, zero=zero
    )
    system, engine, phase = in_engine(config, topology)
    setattr(system, "held_out", lambda phase, topology: HeldOut(topology))  # noqa: B010
    assert isinstance(system, ClosesGap)
    return system.gap_closed(engine.deepspeed, phase, SyncPoint(topology)).scalars


def in_engine(config: RunConfig, topology: Topology) -> tuple[Any, Engine, Phase]:
    """A system, its random model in DeepSpeed's engine, and the phase that it trains."""
    system = create_system(config)
    ds_config = deepspeed_config(dataclasses.replace(config, batch_size=ROWS // topology.data))
    with building(ds_config, torch.float32):
        model = system.build()
    system.initialise(model, topology)
    fill(model, randomise)
    (phase,) = system.phases(model)
    return system, Engine(model, phase, config, ds_config), phase


def likelihoods(config: RunConfig, topology: Topology) -> list[Likelihood]:
    """Of continuations of many lengths, in an engine as training has it. Their number divides by no number of ranks,
    and the longest are read in three pieces where the carry goes on."""
    system, engine, _ = in_engine(config, topology)
    scorer = system_scorer.SystemScorer(system, engine.deepspeed, SyncPoint(topology), padding=0)
    system_scorer.PIECE = LENGTH
    generator = torch.Generator().manual_seed(5)
    requests = []
    for number in range(7):
        ids = torch.randint(VOCABULARY, (3 + 21 * number,), generator=generator).tolist()
        cut = len(ids) - 1 - number
        requests.append(Request(ids[:cut], ids[cut:]))
    return scorer.score(requests)


def main() -> None:
    folder, given = without_local_rank(sys.argv[1:])
    out, degree = Path(folder), int(given)
    topology = start(dataclasses.replace(base(), parallel=ParallelConfig(sequence=degree)))
    for name, config in cases(everything_sharded(out, topology.rank)):
        if topology.world == 4 and name not in FOUR_RANKS[degree]:
            continue
        result = run_case(config, topology)
        if topology.rank == 0:
            torch.save(result, out / f"{name}.pt")
    if topology.world == 1:
        for accumulation in ACCUMULATIONS:
            config = dataclasses.replace(base(), grad_accum=accumulation)
            torch.save(plain_gradients(config), out / f"plain-accum{accumulation}.pt")
        for stage in range(4):
            torch.save(plain_gradients(distillation(stage)), out / f"plain-distilled-zero{stage}.pt")
        for kind in MODELS:
            torch.save(plain_gradients(small_olmo(kind, grad_accum=2)), out / f"plain-{kind}.pt")
    if topology.world < 4:
        zero = "zero0" if topology.world == 1 else "zero2" if topology.sequence == 1 else "zero3"
        batches = batches_of_steps(topology, STEPS)
        found = {kind: updates(kind, zero, topology, *batches, out) for kind in MODELS}
        if topology.rank == 0:
            (out / "updates.json").write_text(json.dumps(found))
    for attachment in FOUR_RANKS_GAPS[degree] if topology.world == 4 else GAPS:
        scalars = gap(attachment, topology, everything_sharded(out, topology.rank) if attachment != "mac" else "zero1")
        if topology.rank == 0:
            (out / f"gap-{attachment}.json").write_text(json.dumps(scalars))
    if topology.sequence < 4:  # four ranks of a sequence on two cores take their time
        config = dataclasses.replace(attached("mac"), zero=everything_sharded(out, topology.rank))
        answers = likelihoods(config, topology)
        # Every rank has them all.
        same = all_gather_object(topology, answers)
        if topology.rank == 0:
            assert all(other == answers for other in same)
            (out / "likelihoods.json").write_text(json.dumps(answers))
    kinds = {kind: base(kind) for kind in ("window", "full")}
    for name, config in {**kinds, **{attachment: attached(attachment) for attachment, _ in ATTACHED}}.items():
        found = causality(config, topology)
        if topology.rank == 0:
            (out / f"causality-{name}.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
