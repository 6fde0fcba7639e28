"""Started by test_speed.py: steps of the first phase on the engine, and the matrix products that they consist of.

Usage: speed_main OUT TOKENIZER DOCUMENTS WIDTH LAYERS. Writes OUT/result.json.

The products have a process of their own, with as many threads, which waits while a step is made and works while this
one waits: their tensors are none of a step's, and would count in the peak of its memory.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from pipeline.config import replace
from pipeline.create_run import create_run
from pipeline.host.hardware import peak_memory
from pipeline.load import checked_system, resolve
from pipeline.meter import Meter
from pipeline.parallel.topology import Topology
from pipeline.recipes.cvfp import cvfp_100k
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.train import Trainer


def products(rows: int, length: int, sizes: CvfpConfig) -> dict[str, Callable[[], None]]:
    """The matrix products of one step at the shapes that it has: those of one application of the blocks to all tokens
    with its gradients, and beside them those of the recurrence over `length` positions of `rows` documents, whose last
    block makes a context alone."""
    width = sizes.width

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    weights = [normal(2 * width, 2 * width) for _ in range(sizes.layers)]
    one, many, gradient = (normal(count, 2 * width) for count in (rows, rows * length, rows * length))
    out_one, out_half = torch.empty(rows, 2 * width), torch.empty(rows, width)
    out_many, out_weight = torch.empty(rows * length, 2 * width), torch.empty(2 * width, 2 * width)

    def recurrence() -> None:
        for _ in range(length):
            for weight in weights[:-1]:
                torch.mm(one, weight.T, out=out_one)
            torch.mm(one, weights[-1][:width].T, out=out_half)

    def forward() -> None:
        for weight in weights:
            torch.mm(many, weight.T, out=out_many)

    def backward() -> None:
        for weight in weights:
            torch.mm(gradient, weight, out=out_many)
            torch.mm(gradient.T, many, out=out_weight)

    return {"recurrence": recurrence, "forward": forward, "backward": backward}


def seconds(what: Callable[[], object]) -> float:
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def take_turns(pipe: Connection, threads: int, rows: int, length: int, sizes: CvfpConfig) -> None:
    """Seconds of each of the products whenever `pipe` asks for them, until it says False; a first answer says that they
    have been computed once."""
    torch.set_num_threads(threads)
    parts = products(rows, length, sizes)
    for what in parts.values():
        what()
    pipe.send(True)
    while pipe.recv():
        pipe.send({name: seconds(what) for name, what in parts.items()})


if __name__ == "__main__":
    out, tokenizer = Path(sys.argv[1]), sys.argv[2]
    documents, width, layers = map(int, sys.argv[3:6])
    base = cvfp_100k()
    config = replace(
        base, data__dataset="stdlib", data__tokenizer=tokenizer, data__text_field="text", model__embedding=None,
        model__width=width, model__layers=layers, model__num_samples=documents, model__data_cache=str(out / "cache"),
        phases=("fixed_point",), output_dir=out / "run", evaluation__best=None, evaluation__patience=0,
    )  # fmt: skip
    topology: Topology = start(config)
    run = create_run(resolve(checked_system(config, topology), topology), topology)
    trainer, meter, sync_point = Trainer(run), Meter(run), SyncPoint(topology)
    assert isinstance(run.config.model, CvfpConfig)
    sizes = run.config.model
    run.system.begin_phase(run.engine.module, run.phase, sync_point)
    slots = run.system.loader(run.phase, topology).slots  # type: ignore[attr-defined]
    found: dict[str, list[float]] = {"engine": []}

    def step(number: int) -> None:
        meter.record(number, trainer.step(number, meter))

    # The first pass has no distance to a pass before.
    for number in range(1, slots + 3):
        step(number)
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    numbers = (torch.get_num_threads(), config.batch_size, config.sequence_length, sizes)
    beside = context.Process(target=take_turns, args=(end, *numbers), daemon=True)
    beside.start()
    end.close()
    # No step is timed while it starts, and none of its turns is its first.
    pipe.recv()
    tokens = run.progress.tokens
    for number in range(slots + 3, 2 * slots + 3):
        # In turn: minutes later the machine may be another one.
        found["engine"].append(seconds(lambda: step(number)))  # noqa: B023 - called at once
        pipe.send(True)
        for name, taken in pipe.recv().items():
            found.setdefault(name, []).append(taken)
    pipe.send(False)
    beside.join()
    peak_of_steps = peak_memory()
    run.system.evaluate(run.engine.deepspeed, run.phase, sync_point)
    facts = {
        "seconds": found, "tokens": run.progress.tokens - tokens, "peak": peak_memory(),
        "peak of steps": peak_of_steps, "threads": torch.get_num_threads(),
        "vocab": sizes.vocab, "parameters": sum(parameter.numel() for parameter in run.engine.module.parameters()),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(facts))
    stop()
    exit_process(0)
