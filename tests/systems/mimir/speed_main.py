"""Started by test_speed.py: steps of the preset `small` on the engine and in a plain PyTorch loop, in turn.

Usage: speed_main OUT ROUNDS. Writes OUT/result.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config import replace
from pipeline.create_run import create_run
from pipeline.load import checked_system, resolve
from pipeline.meter import Meter
from pipeline.parallel.topology import Topology
from pipeline.recipes.mimir import mimir_small
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.systems.mimir.model import MimirModel
from pipeline.systems.mimir.peptides import PeptideBatch
from pipeline.systems.mimir.system import MimirSystem
from pipeline.train import Trainer

WARM_UP = 3


def plain_loop(system: MimirSystem, batches: list[PeptideBatch], topology: Topology) -> Callable[[int], float]:
    """A step as a person would write it down: the same module and noise, cross-entropy, clipping and AdamW."""
    config, kernel = system.config, system.kernel
    model = system.build()
    assert isinstance(model, MimirModel)
    system.initialise(model, topology)
    groups = [
        {"params": [model.get_parameter(name) for name in group.parameters], "weight_decay": group.weight_decay}
        for group in system.phases(model)[0].groups
    ]
    betas, eps = config.optimizer.betas, config.optimizer.eps
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=eps, fused=True)

    def step(number: int) -> float:
        batch = batches[number % len(batches)]
        t = kernel.timesteps(0, batch.domain, batch.draws, batch.lengths)
        xt = kernel.corrupt(batch.letters, t, batch.lengths, 0, batch.domain, batch.draws)
        output = model(xt, kernel.level(t), batch.lengths, batch.labels, batch.targets)
        inside = torch.arange(batch.letters.shape[1]) < batch.lengths[:, None]
        loss = torch.nn.functional.cross_entropy(output.logits[inside], batch.letters[inside])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def seconds(step: Callable[[int], float], number: int) -> float:
    begun = time.perf_counter()
    step(number)
    return time.perf_counter() - begun


if __name__ == "__main__":
    out, rounds = Path(sys.argv[1]), int(sys.argv[2])
    config = replace(
        mimir_small(), data__path=(), data__dataset="synthetic", output_dir=out / "run", epochs__train=0.0, steps=10_000
    )
    topology = start(config)
    run = create_run(resolve(checked_system(config, topology), topology), topology)
    trainer, meter = Trainer(run), Meter(run)
    assert isinstance(run.system, MimirSystem)
    waits = []

    def engine(number: int) -> float:
        # Every step's numbers, as with --report.log-every 1.
        record = meter.record(number + 1, trainer.step(number + 1, meter))
        waits.append(record.data_wait)
        return record.loss

    loader = run.system.loader(run.phase, topology)
    plain = plain_loop(run.system, [batch for _ in range(rounds + WARM_UP) for batch in loader.next_step()], topology)
    found: dict[str, list[float]] = {"engine": [], "plain": []}
    losses = [engine(0), plain(0)]
    for number in range(1, rounds + WARM_UP):
        # Every other round backwards: what comes first in a round may find another machine.
        for name in found if number % 2 else reversed(found):
            found[name].append(seconds(engine if name == "engine" else plain, number))
    kept = {name: times[WARM_UP - 1 :] for name, times in found.items()}
    facts = {"seconds": kept, "losses": losses, "data_wait": max(waits[WARM_UP:]), "threads": torch.get_num_threads()}
    (out / "result.json").write_text(json.dumps(facts))
    stop()
    exit_process(0)
