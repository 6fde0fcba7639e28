"""What `eval --suite NAME` runs beside or in place of a system's own evaluation: a registry, with each one's flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.capabilities import ClosesGap, JudgesPeptides, MeasuresContexts, Recalls, RemembersFacts, ScoresText
from pipeline.checkpoint.loader_state import makers_at
from pipeline.commands.flags import pop_flag
from pipeline.data.text_tasks import FORMS
from pipeline.downstream.evaluate import evaluate_tasks, own_decoder
from pipeline.downstream.tasks import DEFAULT_TASKS, Loaded, check_path, load_tasks, writes_text
from pipeline.errors import UserError, shown
from pipeline.inference.trained import find, load_trained, read_run
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, Phase, System, create_system


@dataclass(frozen=True)
class Suite:
    """One kind of evaluation."""

    evaluate: Callable[[Any, nn.Module, Phase, SyncPoint, Mapping[str, Any]], Evaluation]
    """Of a system that `needs` allows, with the values of the suite's flags that were given."""
    needs: type = System
    """The class or capability that a system must have."""
    lacks: str = ""
    """What a system without it lacks."""
    flags: Mapping[str, Callable[[str, str], Any]] = field(default_factory=dict)
    """From the flags of its own to what reads (flag, value). Raises UserError."""
    prepare: Callable[[Mapping[str, Any], Any, Path, Topology], Mapping[str, Any]] | None = None
    """From the values of the flags, a system and its checkpoint to what `evaluate` takes: what can fail before a model
    is loaded. Collective."""
    reads_data: bool = True
    """Whether it reads the data that the model was trained on."""


@dataclass(frozen=True)
class Chosen:
    """A suite with the values of its flags."""

    name: str | None
    suite: Suite
    values: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Where its results go, below those of the checkpoint; empty for the system's own evaluation."""
        return self.name or ""

    def check(self, system: System) -> None:
        """Raises UserError when the system cannot be evaluated so."""
        if not isinstance(system, self.suite.needs):
            raise UserError(f"--suite {self.name}: {system.config.recipe} {self.suite.lacks}: leave it out")

    def prepared(self, system: System, checkpoint: Path, topology: Topology) -> Chosen:
        """With all that it needs besides the model. Collective; raises UserError."""
        if self.suite.prepare is None:
            return self
        return dataclasses.replace(self, values=self.suite.prepare(self.values, system, checkpoint, topology))

    def run(self, system: System, model: nn.Module, phase: Phase, sync_point: SyncPoint) -> Evaluation:
        """What it finds, the same on every rank. Collective."""
        return self.suite.evaluate(system, model, phase, sync_point, self.values)


def counts(flag: str, words: str) -> tuple[int, ...]:
    """Numbers above 0, such as 1024,16384. Raises UserError."""
    parts = words.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{flag} {shown(words)}: give whole numbers above 0, such as 1024,16384")
    return tuple(map(int, parts))


def rising_counts(flag: str, words: str) -> tuple[int, ...]:
    """Numbers above 0, each larger than the one before it. Raises UserError."""
    found = counts(flag, words)
    if list(found) != sorted(set(found)):
        rising = ",".join(map(str, sorted(set(found))))
        raise UserError(f"{flag} {shown(words)}: give rising numbers: {flag} {rising}")
    return found


def count(flag: str, words: str) -> int:
    """One number above 0. Raises UserError."""
    found = counts(flag, words)
    if len(found) > 1:
        raise UserError(f"{flag} {shown(words)}: give one number")
    return found[0]


def number(flag: str, words: str) -> float:
    """A number of 0 or more. Raises UserError."""
    try:
        found = float(words)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise UserError(f"{flag} {shown(words)}: give a number of 0 or more")
    return found


def _own(system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]) -> Evaluation:
    found: Evaluation = system.evaluate(model, phase, sync_point)
    return found


def _recall(
    system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]
) -> Evaluation:
    options = {flag.removeprefix("--"): value for flag, value in values.items()}
    found: Evaluation = system.recall_suite(model, sync_point, **options)
    return found


def _peptides(
    system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]
) -> Evaluation:
    options = {flag.removeprefix("--"): value for flag, value in values.items()}
    found: Evaluation = system.peptide_suite(model, phase, sync_point, **options)
    return found


def _lifelong(
    system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]
) -> Evaluation:
    options = {flag.removeprefix("--"): value for flag, value in values.items()}
    found: Evaluation = system.lifelong_suite(model, phase, sync_point, **options)
    return found


def _long(system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]) -> Evaluation:
    found: Evaluation = system.gap_closed(model, phase, sync_point)
    return found


def run_of(flag: str, words: str) -> Path:
    """A checkpoint, or the newest one of a run. Raises UserError."""
    return find(Path(words), f"give {flag} a checkpoint or the directory of a run")


def _with_control(values: Mapping[str, Any], system: Any, checkpoint: Path, topology: Topology) -> Mapping[str, Any]:
    if CONTROL not in values:
        return values
    with shared_errors(topology):
        config = read_run(values[CONTROL])
        system.check_control(checkpoint, config, values[CONTROL])
    return {**values, CONTROL_CONFIG: config}


def _contexts(
    system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]
) -> Evaluation:
    control = None
    if CONTROL in values:
        config = values[CONTROL_CONFIG]
        with shared_errors(sync_point.topology):
            trained = load_trained(values[CONTROL], config, create_system(config))
        control = trained.system, trained.model.to(next(model.parameters()).device)
    found: Evaluation = system.context_suite(model, phase, sync_point, control)
    return found


def names(flag: str, words: str) -> tuple[str, ...]:
    """Names apart from each other, such as sciq,copa. Raises UserError."""
    parts = [part.strip() for part in words.split(",")]
    if not all(parts):
        raise UserError(f"{flag} {shown(words)}: give names, such as sciq,copa")
    return tuple(parts)


def forms(flag: str, words: str) -> tuple[str, ...]:
    """Forms of questions about text. Raises UserError."""
    found = names(flag, words)
    if unknown := [name for name in found if name not in FORMS]:
        raise UserError(f"{flag} {shown(unknown[0])}: give some of {', '.join(FORMS)}")
    return found


def folder(flag: str, words: str) -> str:
    """A folder that is there. Raises UserError."""
    check_path(words, flag)
    return words


def chosen_tasks(values: Mapping[str, Any], topology: Topology) -> Loaded:
    """The tasks that the flags of `downstream` name. Collective; raises UserError."""
    flag = "--tasks" if "--tasks" in values else f"--suite {DOWNSTREAM}"
    return load_tasks(values.get("--tasks", DEFAULT_TASKS), values.get("--task-path"), topology, flag)


def _with_tasks(values: Mapping[str, Any], system: Any, checkpoint: Path, topology: Topology) -> Mapping[str, Any]:
    with shared_errors(topology):
        tokenizer = system.tokenizer(makers_at(checkpoint))
    return {**values, TASKS: chosen_tasks(values, topology), TOKENIZER: tokenizer}


def _downstream(
    system: Any, model: nn.Module, phase: Phase, sync_point: SyncPoint, values: Mapping[str, Any]
) -> Evaluation:
    loaded, tokenizer = values[TASKS], values[TOKENIZER]
    decoder = own_decoder(system, model) if writes_text(loaded) else None
    return evaluate_tasks(system, model, sync_point, loaded, tokenizer, values.get("--limit"), decoder)


CONTROL, CONTROL_CONFIG = "--control", "config of the control"
"""Among the values of `contexts`, once it is prepared: a checkpoint, and the config of its run."""
TASKS, TOKENIZER = "tasks", "tokenizer"
"""Among the values of `downstream`, once it is prepared: the tasks with their data, and the model's tokenizer."""
DOWNSTREAM = "downstream"
"""The suite of tasks, which folders that transformers loads are evaluated with too."""
OWN = Suite(_own)
"""A system's own evaluation, as in training."""
SUITES = {
    "long": Suite(_long, ClosesGap, "has no memory behind an attention window"),
    "recall": Suite(
        _recall,
        Recalls,
        "cannot be asked for what stood far back",
        flags={"--lengths": counts, "--queries": count, "--forms": forms},
    ),
    "lifelong": Suite(
        _lifelong,
        RemembersFacts,
        "has no memory of earlier documents",
        flags={"--streams": count, "--documents": rising_counts, "--lengths": rising_counts},
    ),
    "peptides": Suite(
        _peptides,
        JudgesPeptides,
        "is no model of peptides",
        flags={
            **dict.fromkeys(("--samples", "--peptides", "--decoys"), count),
            **dict.fromkeys(("--guidance", "--temperature"), number),
        },
    ),
    "contexts": Suite(_contexts, MeasuresContexts, "has no contexts", flags={CONTROL: run_of}, prepare=_with_control),
    DOWNSTREAM: Suite(
        _downstream,
        ScoresText,
        "reads no text",
        flags={"--tasks": names, "--limit": count, "--task-path": folder},
        prepare=_with_tasks,
        reads_data=False,
    ),
}
"""The suites by name."""


def pop_suite(words: Sequence[str]) -> tuple[Chosen, list[str]]:
    """The suite that the words of a command name, and the words without its flags. Raises UserError."""
    name, rest = pop_flag(list(words), "--suite")
    if name is None:
        return Chosen(None, OWN, {}), rest
    if name not in SUITES:
        raise UserError(f"--suite {shown(name)}: give one of {', '.join(SUITES)}, or leave it out")
    values = {}
    for flag, read in SUITES[name].flags.items():
        value, rest = pop_flag(rest, flag)
        if value is not None:
            values[flag] = read(flag, value)
    return Chosen(name, SUITES[name], values), rest
