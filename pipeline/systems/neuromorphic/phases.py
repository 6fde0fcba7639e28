"""The phases: which memories each one uses, what it trains, for how long, and on what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pipeline.config import RunConfig
from pipeline.system import ParameterGroup, Phase
from pipeline.systems.neuromorphic.config import PHASES, NeuromorphicConfig
from pipeline.systems.neuromorphic.data import phase_reads
from pipeline.systems.neuromorphic.state import Uses
from pipeline.systems.neuromorphic.weights import is_vector, trained

USES = {"A": Uses(episodic="absent"), "B": Uses(), "C": Uses(lifelong=True)}


def run_phases(config: RunConfig) -> tuple[str, ...]:
    """Names of the phases of a run, in their order."""
    return config.phases or PHASES


def steps_of(config: RunConfig, phase: str) -> int:
    """The steps of a phase."""
    assert isinstance(config.model, NeuromorphicConfig)
    own = config.model.lifelong_steps if phase == "C" else None
    return config.steps if own is None else own


def create_phases(config: RunConfig, model: nn.Module) -> Sequence[Phase]:
    """Phases A, B and C. Each begins its schedule anew; moments go on by name.

    A phase that reads the data of the one before it goes on in it: its documents are others, and the state of every
    stream stays. With data of its own it begins with empty streams.
    """
    names = [name for name, _ in model.named_parameters()]
    # Of a run that leaves a phase out, the one before is another.
    order = [phase for phase in PHASES if phase in run_phases(config)]
    before = dict(zip(order[1:], order, strict=False))
    found = []
    for phase in PHASES:
        same = phase in before and phase_reads(config, before[phase]) == phase_reads(config, phase)
        groups = _groups((name for name in names if trained(name, phase)), config.weight_decay)
        found.append(Phase(phase, steps_of(config, phase), groups, keep_carry=same))
    return found


def _groups(names: Iterable[str], weight_decay: float) -> tuple[ParameterGroup, ...]:
    matrices: list[str] = []
    vectors: list[str] = []
    for name in names:
        (vectors if is_vector(name) else matrices).append(name)
    return (
        ParameterGroup("matrices", tuple(matrices), weight_decay=weight_decay),
        ParameterGroup("vectors", tuple(vectors)),
    )
