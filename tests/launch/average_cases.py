"""Cases of phases_main: the moving average of the weights, the best checkpoint, and a stop without a better one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.manifest import BEST, complete_checkpoints, step_of
from pipeline.checkpoint.parameters import Parameters
from pipeline.checkpoint.trainable import AVERAGE
from pipeline.config import OptimizerConfig, ParallelConfig, RunConfig
from pipeline.evaluation_config import EvaluationConfig
from pipeline.job import train
from pipeline.load import load_model
from pipeline.runtime.ranks import start
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, create_system
from tests.launch.comparing import differences
from tests.toy_systems.phased import phased

LAST, MIDDLE, DECAY = 5, 3, 0.2
"""The decay holds from the third update on, a smaller one before."""
LAYOUTS = {
    1: [("zero0", 1, "fp32"), ("zero0", 1, "bf16")],
    2: [("zero2", 2, "bf16"), ("zero3", 1, "fp32")],
}
"""By ranks: stage, sequence degree, precision."""
PADDED = "/optimizer_state_dict/fp32_flat_groups/0"
Note = Callable[[str, Callable[[], Any]], None]


class Averages:
    """The runs of one number of ranks, all of the last phase alone, which trains parameters that two ranks do not
    divide."""

    def __init__(self, out: Path, world: int, note: Note) -> None:
        self.out, self.world, self.note = out, world, note

    def config(self, folder: Path, zero: str, degree: int, precision: str, **changes: Any) -> RunConfig:
        given: dict[str, Any] = {
            "phases": ("C",), "save_every": 1, "eval_every": 2, "sample_every": 2, "save_at_start": True,
            "async_save": True, "precision": precision,
            "optimizer": OptimizerConfig(ema_decay=DECAY, min_lr_ratio=0.2), **changes,
        }  # fmt: skip
        parallel = ParallelConfig(sequence=degree)
        return phased(folder, data=self.world // degree, zero=zero, parallel=parallel, **given)

    def straight(self) -> None:
        for layout in LAYOUTS[self.world]:
            name = "-".join(map(str, (*layout, self.world)))
            folder, plain = self.out / f"averaged-{name}", self.out / f"plain-{name}"
            train(self.config(folder, *layout))
            self.note(f"averaged off {name}", lambda f=folder: off(f))
            train(self.config(plain, *layout, optimizer=OptimizerConfig(min_lr_ratio=0.2)))
            self.note(f"averaged weights {name}", lambda f=folder, p=plain: changed(f, p))
            found = self.evaluated(folder, self.config(folder, *layout))
            self.note(f"averaged evaluated {name}", lambda f=found: f)
            stopped = self.out / f"averaged-stopped-{name}"
            for stop in (MIDDLE, None):
                train(self.config(stopped, *layout, stop_after=stop))
            self.note(f"averaged resumed {name}", lambda f=folder, s=stopped: otherwise(at(f, LAST), at(s, LAST)))

    def evaluated(self, folder: Path, config: RunConfig) -> dict[str, float]:
        """The last held-out loss of a run, and those of its checkpoint's average and of its weights."""
        topology = start(config)
        found = {}
        for name, raw in (("average", False), ("weights", True)):
            system = create_system(config)
            loaded = load_model(config, system, topology, weights=at(folder, LAST), raw=raw)
            phase = next(phase for phase in loaded.phases if phase.name == "C")
            found[name] = system.evaluate(loaded.model, phase, SyncPoint(topology)).scalars["loss"]
        logged = [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["mode"] == "val"][-1]
        return {**found, "logged": logged}

    def leave(self) -> None:
        train(self.config(self.out / "averaged-elastic", "zero3", 1, "fp32", stop_after=MIDDLE))
        plain = OptimizerConfig(min_lr_ratio=0.2)
        train(self.config(self.out / "averaged-late", "zero3", 1, "fp32", stop_after=MIDDLE, optimizer=plain))

    def take(self) -> None:
        """Other ranks and another stage; an average that begins in the midst of a run, and one that ends there."""
        for name in ("elastic", "late"):
            folder = self.out / f"averaged-{name}"
            if folder.is_dir():
                train(self.config(folder, "zero2", 1, "fp32", resume="must"))
        begins = MIDDLE if (self.out / "averaged-late").is_dir() else 0
        self.note("averaged off elastic", lambda: off(self.out / "averaged-elastic"))
        self.note("averaged off late", lambda: off(self.out / "averaged-late", begins))
        self.note("averaged said", lambda: (self.out / "averaged-late" / "training.log").read_text())

    def best(self) -> None:
        """Held-out losses that are known beforehand, straight and with a stop; a run whose patience is raised."""
        losses = {0: 1.0, 1: 5.0, 2: 3.0, 3: float("nan"), 4: 2.0, 5: 2.5, 6: 2.0, 7: 2.25, 8: 9.0, 9: 1.5}
        asked: dict[str, Any] = {"steps": 9, "eval_every": 1, "keep": 1, "save_every": 0, "save_at_start": False}
        patient = EvaluationConfig(steps=1, best="loss", patience=3)
        with scripted(losses):
            straight, stopped = self.out / "best-straight", self.out / "best-stopped"
            train(self.config(straight, "zero1", 1, "fp32", evaluation=patient, **asked))
            self.note("best", lambda: left(straight))
            for stop in (3, 5, None):
                train(self.config(stopped, "zero1", 1, "fp32", evaluation=patient, **asked, stop_after=stop))
            self.note("best stopped", lambda: left(stopped))
            self.note("best differs", lambda: differences(at(straight, 7), at(stopped, 7)))
            before = left(straight)
            train(self.config(straight, "zero1", 1, "fp32", evaluation=patient, **asked))
            self.note("best again", lambda: before == left(straight))
            further = dataclasses.replace(patient, patience=5)
            train(self.config(straight, "zero1", 1, "fp32", evaluation=further, **asked))
            self.note("best further", lambda: left(straight))
            back, other = self.out / "best-back", self.out / "best-other"
            seldom: dict[str, Any] = {**asked, "eval_every": 4, "save_every": 1, "keep": 9, "evaluation": patient}
            train(self.config(back, "zero1", 1, "fp32", **seldom, stop_after=5))
            train(self.config(other, "zero1", 1, "fp32", **seldom, stop_after=6, resume=str(at(back, 5))))
            train(self.config(back, "zero1", 1, "fp32", **seldom, stop_after=3, resume=str(at(back, 2))))
            for folder in (back, other):
                self.note(f"best gone {folder.name}", lambda folder=folder: without_best(folder))


def at(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint-{step}"


def off(folder: Path, begins: int = 0) -> float:
    """How far the averages in a run's checkpoints are from those of its float32 weights, by the formula in float64."""
    worst, average = 0.0, {}
    for step in range(begins, LAST + 1):
        saved = Parameters(at(folder, step)).read(moments=False)
        weights = {parameter.name: parameter.tensors["fp32"].double() for parameter in saved}
        if step == begins:
            average = weights
            continue
        before = step - begins - 1
        decay = min(DECAY, (1 + before) / (10 + before))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
        found = load_file(at(folder, step) / AVERAGE)
        assert set(found) == {"early.weight", "late.weight", "late.bias", "extra"}
        assert all(value.dtype == torch.float32 for value in found.values())
        worst = max(worst, *(float((found[name] - average[name]).abs().max()) for name in found))
    return worst


def changed(folder: Path, plain: Path) -> list[str]:
    """What a run with an average trains otherwise than one without, to the bit, at any step."""
    found = [place for step in range(LAST + 1) for place in otherwise(at(folder, step), at(plain, step))]
    return [place for place in found if place != AVERAGE]


def otherwise(one: Path, other: Path) -> list[str]:
    """As `differences`, but for what ZeRO-3 pads its parts with, which a fresh run finds in memory: its parameters are
    compared by name."""
    places = [place for place in differences(one, other) if not place.endswith("_optim_states.pt" + PADDED)]
    parameters = zip(Parameters(one).read(), Parameters(other).read(), strict=True)
    return places + [
        f"{saved.name} {kind}"
        for saved, again in parameters
        for kind, value in saved.tensors.items()
        if not torch.equal(value.view(torch.int32), again.tensors[kind].view(torch.int32)) or saved.step != again.step
    ]


@contextmanager
def scripted(losses: dict[int, float]) -> Iterator[None]:
    """Evaluations of the toy system give the losses by the steps that the model has made."""
    from tests.toy_systems.phased.system import PhasedSystem

    evaluate = PhasedSystem.evaluate

    def give(system: Any, model: Any, phase: Any, sync_point: Any) -> Evaluation:
        # DeepSpeed's engine has the model inside.
        steps = next(buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "steps")
        return Evaluation({"loss": losses[int(steps)]})

    PhasedSystem.evaluate = give  # type: ignore[method-assign]
    try:
        yield
    finally:
        PhasedSystem.evaluate = evaluate  # type: ignore[method-assign]


def without_best(folder: Path) -> dict[str, Any]:
    """Whether a best checkpoint is named, and what the log says of it."""
    lines = (folder / "training.log").read_text().splitlines()
    said = [line.partition("checkpoints/best names none: ")[2] for line in lines if "names none" in line]
    return {"best": (folder / "checkpoints" / BEST).exists(), "said": said}


def left(folder: Path) -> dict[str, Any]:
    """What a run with a best checkpoint has left: its checkpoints, the best, and how it ended."""
    saved = [step_of(path) for path in complete_checkpoints(folder / "checkpoints")]
    state = json.loads((at(folder, saved[-1]) / "trainer_state.json").read_text())
    rows = [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["mode"] == "val"]
    return {
        "saved": saved,
        "best": (folder / "checkpoints" / BEST).read_text().strip(),
        "status": json.loads((folder / "run.json").read_text())["status"],
        "state": {name: state[name] for name in ("best_of", "best", "best_step", "not_better", "phase_done")},
        "evaluated": rows,
        "written": os.stat(folder / "run.json").st_mtime_ns,
    }
