"""Started by test_phases.py on every rank: a system of three phases against plain PyTorch, stops and resumes around its
switches, and phases run one by one.

Usage: phases_main OUT. On two ranks it leaves OUT/elastic-*, runs in the midst of their second phase, which one rank
finishes. Rank 0 writes OUT/result-WORLD.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.cli import main as mnemos
from pipeline.cli import without_local_rank
from pipeline.config import ParallelConfig, ReportConfig, RunConfig
from pipeline.errors import UserError
from pipeline.job import train
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import stop
from tests import toy_systems
from tests.launch.average_cases import Averages
from tests.launch.comparing import differences
from tests.launch.phases_reference import Reference, reference
from tests.toy_systems.phased import phased

ELASTIC = {"zero0": ("zero3", 1), "zero1": ("zero0", 1), "zero2": ("zero1", 2), "zero3": ("zero2", 1)}
"""Stage on one rank, and stage and sequence degree on the two that began the run."""
TOLERANCE = {"zero0": 1e-6}
SHARDED = 1e-5


def threshold_of(config: RunConfig) -> float:
    """Between two losses of the first phase, so that the fourth of its five steps is the last."""
    losses = [row[2] for row in reference(config, threshold=0.0).rows[: config.steps]]
    assert losses[3] < 0.98 * min(losses[:3]), losses
    return (losses[3] + min(losses[:3])) / 2


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint-{step}"


def rows_of(folder: Path, mode: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["mode"] == mode]


def error(folder: Path, truth: Reference, phases: str = "ABC") -> float:
    """The largest difference of a loss, a rate or a weight at a phase's end, over the whole run."""
    rows = rows_of(folder)
    places = [(row["phase"], row["phase_step"]) for row in rows]
    assert places == [(phase, step) for phase, step, _, _ in truth.rows], places
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    worst = max(
        max(abs(row["loss"] - loss), abs(row["lr"] - rate))
        for row, (_, _, loss, rate) in zip(rows, truth.rows, strict=True)
    )
    for phase in phases:
        weights = load_file(checkpoint(folder, truth.end_of(phase)) / TRAINABLE)
        # What any phase trains is in every checkpoint, and nothing else of the model's parameters is.
        assert set(weights) == {"early.weight", "early.bias", "late.weight", "late.bias", "extra", "steps", "begun"}
        assert int(weights.pop("steps")) == truth.end_of(phase)
        found = [float((value - truth.weights[phase][name]).abs().max()) for name, value in weights.items()]
        worst = max(worst, *found)
    return worst


def same(one: Path, other: Path, step: int) -> list[str]:
    """What differs between two runs at a step: bits of the checkpoint, the progress, rows up to there."""
    found = differences(checkpoint(one, step), checkpoint(other, step))
    states = [json.loads((checkpoint(run, step) / "trainer_state.json").read_text()) for run in (one, other)]
    if {**states[0], "elapsed": 0} != {**states[1], "elapsed": 0}:
        found.append(f"trainer_state {states}")
    for mode in ("train", "val"):
        timed = ("elapsed", "tok_s", "peak_memory", "data_wait")
        both = [
            [{key: value for key, value in row.items() if key not in timed} for row in rows_of(run, mode)]
            for run in (one, other)
        ]
        if both[0] != both[1]:
            found.append(f"{mode} rows {both}")
    return found


class Cases:
    """The cases of one number of ranks. Every rank calls everything; rank 0 looks at the files."""

    def __init__(self, out: Path, world: int) -> None:
        self.out, self.world, self.found = out, world, {}
        self.threshold = threshold_of(phased(out))
        self.truth = reference(phased(out), self.threshold)
        self.first, self.second = self.truth.end_of("A"), self.truth.end_of("B")
        self.last = len(self.truth.rows)

    def config(self, folder: Path, zero: str, sequence: int = 1, **changes: Any) -> RunConfig:
        changes.setdefault("threshold", self.threshold)
        return phased(
            folder, data=self.world // sequence, zero=zero,
            parallel=ParallelConfig(sequence=sequence), **changes,
        )  # fmt: skip

    def note(self, case: str, find: Callable[[], Any]) -> None:
        if dist.get_rank() == 0:
            self.found[case] = find()
            (self.out / f"result-{self.world}.json").write_text(json.dumps(self.found))
        dist.barrier()

    def layouts(self) -> list[tuple[str, int]]:
        return [(f"zero{stage}", degree) for stage in range(4) for degree in (1, 2) if degree <= self.world]

    def straight(self) -> None:
        for zero, degree in self.layouts():
            folder = self.folder(zero, degree)
            train(self.config(folder, zero, degree))
            self.note(f"error {zero} sequence {degree}", lambda folder=folder: error(folder, self.truth))
            val = [(0, "A"), (self.first, "A"), (self.second, "B"), (self.last, "C")]
            self.note(
                f"evaluated {zero} sequence {degree}",
                lambda folder=folder, val=val: (
                    [
                        (row["step"], row["phase"])
                        for row in rows_of(folder, "val")
                        if row.get(f"of_{row['phase']}") == 1.0
                    ]
                    == val
                ),
            )

    def folder(self, zero: str, degree: int) -> Path:
        return self.out / f"straight{self.world}-{zero}-{degree}"

    def stopped(self, zero: str, degree: int) -> None:
        """Stops and resumes before, at and behind both switches."""
        folder, ends = self.out / f"stopped{self.world}-{zero}-{degree}", (self.first, self.second)
        for step in [end + offset for end in ends for offset in (-1, 0, 1)]:
            train(self.config(folder, zero, degree, stop_after=step))
        train(self.config(folder, zero, degree, resume="must"))
        self.note(f"stopped {zero} sequence {degree}", lambda: self._compared(folder, zero, degree))

    def _compared(self, folder: Path, zero: str, degree: int) -> list[str]:
        straight = self.folder(zero, degree)
        steps = (self.first, self.second, self.last)
        stops = [(row["step"]) for row in rows_of(folder, "val")]
        # A stop evaluates too: what is left are the rows of the others.
        rows = folder / "metrics.jsonl"
        kept = [row for row in read_rows(rows) if row["mode"] == "train" or row["step"] in (0, *steps)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
        expected = sorted({0, *steps, *(end + offset for end in steps[:2] for offset in (-1, 1))})
        wrong = [] if stops == expected else [f"evaluated {stops}"]
        return wrong + [place for step in steps for place in same(straight, folder, step)]

    def one_by_one(self) -> None:
        """Each phase in a run directory of its own."""
        before: Path | None = None
        for phase in "ABC":
            folder = self.out / f"alone{self.world}-{phase}"
            resume = {} if before is None else {"resume": str(before)}
            train(self.config(folder, "zero1", phase=phase, **resume))
            before = folder
        straight, last = self.folder("zero1", 1), self.out / f"alone{self.world}-C"
        self.note("one by one", lambda: differences(checkpoint(straight, self.last), checkpoint(last, self.last)))
        train(self.config(self.out / f"alone{self.world}-inside", "zero1", phase="A", stop_after=2))
        for phase in "BC":
            folder = self.out / f"alone{self.world}-refused"
            inside = str(self.out / f"alone{self.world}-inside")
            self.refusal(phase, self.config(folder, "zero1", phase=phase, resume=inside))

    def refusal(self, case: str, config: RunConfig) -> None:
        message = ""
        try:
            train(config)
        except UserError as error:
            message = str(error)
        self.note(f"refused {case}", lambda: message)

    def picked(self) -> None:
        """Two of the phases, the second of them without the one that comes before it in the system."""
        for phases in ("AC", "B"):
            folder = self.out / f"picked{self.world}-{phases}"
            train(self.config(folder, "zero2", phases=tuple(phases)))
            truth = reference(phased(self.out), self.threshold, phases)
            self.note(f"error picked {phases}", lambda f=folder, t=truth, p=phases: error(f, t, p))

    def unevaluated(self) -> None:
        """A run that dies between the commit that ends a phase and the evaluation that it owes."""
        from tests.toy_systems.phased.system import PhasedSystem

        class Died(Exception):
            pass

        evaluate, folder = PhasedSystem.evaluate, self.out / f"died{self.world}"

        def dies(system: Any, model: Any, phase: Any, sync_point: Any) -> Any:
            if (checkpoint(folder, self.first)).exists():
                raise Died
            return evaluate(system, model, phase, sync_point)

        PhasedSystem.evaluate = dies  # type: ignore[method-assign]
        try:
            train(self.config(folder, "zero1"))
            died = False
        except Died:
            died = True
        finally:
            PhasedSystem.evaluate = evaluate  # type: ignore[method-assign]
        train(self.config(folder, "zero1"))
        straight = self.folder("zero1", 1)
        self.note("died unevaluated", lambda: [*same(straight, folder, self.last), *([] if died else ["alive"])])

    def all_trained(self) -> None:
        """A last phase that trains all that any phase does: what the one before it left out is as it was."""
        folder = self.out / f"whole{self.world}"
        train(self.config(folder, "zero1", whole=True))
        truth = reference(phased(self.out), self.threshold, whole=True)
        self.note("error all trained", lambda: error(folder, truth))

    def from_weights(self) -> None:
        """A run from other weights, whose folder is gone when its second phase begins."""
        other, base, folder = (self.out / f"{name}{self.world}" for name in ("other", "from", "from-gone"))
        train(self.config(other, "zero1", seed=4, phases=("B",)))
        weights = {"init_from": checkpoint(other, 5), "phases": ("A", "C")}
        train(self.config(base, "zero1", **weights))
        train(self.config(folder, "zero1", stop_after=self.first, **weights))
        if dist.get_rank() == 0:
            shutil.rmtree(other)
        dist.barrier()
        train(self.config(folder, "zero1", phases=("A", "C")))
        last = int(rows_of(base)[-1]["step"]) if dist.get_rank() == 0 else 0
        self.note("from weights", lambda: differences(checkpoint(base, last), checkpoint(folder, last)))

    def fails_at_switch(self) -> None:
        """A next phase that cannot begin is a failure that run.json and the log know of."""
        from tests.toy_systems.phased.system import PhasedSystem

        loader, folder = PhasedSystem.loader, self.out / f"failed{self.world}"

        def refuses(system: Any, phase: Any, topology: Any) -> Any:
            if phase.name == "B":
                raise UserError("--data: gone")
            return loader(system, phase, topology)

        PhasedSystem.loader = refuses  # type: ignore[method-assign]
        try:
            self.refusal("at a switch", self.config(folder, "zero1"))
        finally:
            PhasedSystem.loader = loader  # type: ignore[method-assign]

        def left() -> list[str]:
            log = (folder / "training.log").read_text().splitlines()
            return [json.loads((folder / "run.json").read_text())["status"], log[-1].partition("  ")[2]]

        self.note("left at a switch", left)
        train(self.config(folder, "zero1"))
        self.note("after a failure", lambda: same(self.folder("zero1", 1), folder, self.last))

    def intervals(self) -> None:
        """Samples and ablations at intervals and ends; those that a kill took the run away from are made up for."""
        folder = self.out / f"intervals{self.world}"
        every: dict[str, Any] = {"sample_every": 2, "ablate_every": 3}
        every["report"] = ReportConfig(plots=False, log_every=3)
        train(self.config(folder, "zero1", stop_after=self.first + 2, **every))
        if dist.get_rank() == 0:
            done = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({**done, "sampled": done["sampled"][:-1]}))
            (folder / "samples" / f"drawn-{self.first + 2}.txt").unlink()
        dist.barrier()
        train(self.config(folder, "zero1", resume="must", **every))

        def found() -> dict[str, Any]:
            done = json.loads((folder / "run.json").read_text())
            texts = {path.name: path.read_text() for path in (folder / "samples").glob("drawn-*.txt")}
            rows = [(row["step"], row["phase"], row["without"]) for row in rows_of(folder, "ablate")]
            logged = [(row["step"], "heavy" in row) for row in rows_of(folder)]
            ends = [self.first, self.first + 2, self.second, self.last]
            lists = {"sampled": done["sampled"], "ablated": done["ablated"]}
            return {**lists, "texts": texts, "rows": rows, "logged": logged, "ends": ends}

        self.note("intervals", found)

    def leave_elastic(self) -> None:
        for zero, (before, degree) in ELASTIC.items():
            folder = self.out / f"elastic-{zero}"
            train(self.config(folder, before, degree, stop_after=self.first + 2, async_save=True))

    def take_elastic(self) -> None:
        for zero in ELASTIC:
            folder = self.out / f"elastic-{zero}"
            if folder.is_dir():
                train(self.config(folder, zero, resume="must"))
                self.note(f"error elastic {zero}", lambda folder=folder: error(folder, self.truth))

    def finished(self) -> None:
        """A start of a run that has ended changes nothing; with more steps its last phase goes on."""
        folder, copy = self.folder("zero0", 1), self.out / f"longer{self.world}"
        before = (folder / "run.json").stat().st_mtime_ns if dist.get_rank() == 0 else 0
        train(self.config(folder, "zero0"))
        self.note("nothing is left", lambda: (folder / "run.json").stat().st_mtime_ns == before)
        if dist.get_rank() == 0:
            shutil.copytree(folder, copy)
        dist.barrier()
        train(self.config(copy, "zero0", steps=7))
        self.note("longer", lambda: [(row["phase"], row["phase_step"]) for row in rows_of(copy)][-3:])
        # A phase with a rule, which its number of steps ended.
        unmet = {"threshold": -1.0, "phases": ("A",)}
        for steps in (3, 5):
            train(self.config(self.out / f"unmet{self.world}", "zero0", steps=steps, **unmet))
        self.note("longer unmet", lambda: [row["phase_step"] for row in rows_of(self.out / f"unmet{self.world}")])

    def ended_by_an_evaluation(self) -> None:
        """A first phase that ends at the first of the evaluations, every second step, from its third step on."""
        every: dict[str, Any] = {"eval_every": 2, "threshold": -1.0, "evaluated": 3, "phases": ("A", "B")}
        straight, stopped = (self.out / f"{name}{self.world}" for name in ("evaluated", "evaluated-stopped"))
        train(self.config(straight, "zero1", **every))
        for stop_after in (3, 4, 5):
            train(self.config(stopped, "zero1", stop_after=stop_after, **every))
        train(self.config(stopped, "zero1", **every))
        self.note(
            "ended by an evaluation",
            lambda: {
                "rows": [(row["phase"], row["phase_step"]) for row in rows_of(straight)],
                "differs": differences(checkpoint(straight, 9), checkpoint(stopped, 9)),
            },
        )


def commands(cases: Cases) -> dict[str, Any]:
    """What `plan`, `eval` and `check` say of phases."""
    run = cases.folder("zero0", 1)
    said: dict[str, Any] = {}
    for case, words in {
        "plan": ["plan", "phased_tiny", "--phases", "A", "B"],
        "eval": ["eval", str(checkpoint(run, cases.second))],
        "check": ["check", "phased_tiny", "--phases", "A", "D", "--output-dir", str(cases.out / "unused")],
    }.items():
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
            code = mnemos(words)
        said[case] = [code, text.getvalue()]
    file = run / "evals" / f"checkpoint-{cases.second}" / "evaluation.json"
    said["evaluation"] = json.loads(file.read_text())["scalars"]
    said["logged"] = [row["loss"] for row in rows_of(run, "val") if row["step"] == cases.second]
    return said


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    toy_systems.add()
    torch.set_num_threads(1)
    cases = Cases(out, int(os.environ.get("WORLD_SIZE", "1")))
    cases.straight()
    averages = Averages(out, cases.world, cases.note)
    averages.straight()
    if cases.world == 2:
        for zero, degree in (("zero0", 2), ("zero2", 1), ("zero3", 2)):
            cases.stopped(zero, degree)
        cases.leave_elastic()
        averages.leave()
    else:
        for zero in ("zero1", "zero3"):
            cases.stopped(zero, 1)
        cases.one_by_one()
        cases.picked()
        cases.unevaluated()
        cases.intervals()
        cases.ended_by_an_evaluation()
        cases.all_trained()
        cases.from_weights()
        cases.fails_at_switch()
        cases.take_elastic()
        cases.finished()
        averages.take()
        averages.best()
    stop()
    if cases.world == 1:
        cases.found["commands"] = commands(cases)
        (out / "result-1.json").write_text(json.dumps(cases.found))
    exit_process(0)


if __name__ == "__main__":
    main()
