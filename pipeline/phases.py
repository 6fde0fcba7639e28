"""The phases of a run: which it is made of, the one that it is in, and what is known of each parameter there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.config import RunConfig
from pipeline.errors import UserError, shown
from pipeline.system import ParameterGroup, Phase


@dataclass(frozen=True)
class Phases:
    """The phases of a run in their order, and the one that it is in.

    Everything here follows from the system's phases and the flags alone, so all ranks and all starts agree on it.
    """

    every: tuple[Phase, ...]
    """Those that the run is made of."""
    index: int = 0
    alone: bool = False
    """Whether the run ends with the current one."""
    trained: tuple[str, ...] = ()
    """Parameters that any phase of the system trains, in or out of the run."""

    @property
    def current(self) -> Phase:
        """The phase as it is trained: a group holds only parameters whose moments have seen the same updates."""
        phase = self.every[self.index]
        return dataclasses.replace(phase, groups=_by_age(phase.groups, self._since, self.every))

    @property
    def after(self) -> tuple[Phase, ...]:
        """Those that the run goes on to."""
        return () if self.alone else self.every[self.index + 1 :]

    @property
    def before(self) -> tuple[str, ...]:
        """Names of those that come before the current one."""
        return tuple(phase.name for phase in self.every[: self.index])

    @property
    def fresh(self) -> frozenset[str]:
        """Parameters of the current phase that the one before it did not train: their moments begin anew."""
        return frozenset(name for name, since in self._since.items() if since == self.index)

    @property
    def dropped(self) -> frozenset[str]:
        """Parameters of the phase before that the current one leaves out."""
        return (names(self.every[self.index - 1]) if self.index else frozenset()) - names(self.every[self.index])

    @property
    def at_rest(self) -> frozenset[str]:
        """Parameters that the system trains, and the current phase does not."""
        return frozenset(self.trained) - names(self.every[self.index])

    def named(self, name: str) -> Phase:
        """The phase of this name."""
        return next(phase for phase in self.every if phase.name == name)

    @cached_property
    def _since(self) -> Mapping[str, int]:
        """By parameter of the current phase, the phase since which it has been trained without a break."""
        found = {}
        for name in names(self.every[self.index]):
            since = self.index
            while since and name in names(self.every[since - 1]):
                since -= 1
            found[name] = since
        return found


def names(phase: Phase) -> frozenset[str]:
    """The parameters that a phase trains."""
    return frozenset(name for group in phase.groups for name in group.parameters)


def _by_age(
    groups: Sequence[ParameterGroup], since: Mapping[str, int], phases: Sequence[Phase]
) -> tuple[ParameterGroup, ...]:
    """Groups that are split where their parameters have been trained since different phases: ZeRO counts the updates of
    a group, and Adam divides by what they count."""
    split = []
    for group in groups:
        ages = sorted({since[name] for name in group.parameters})
        if len(ages) < 2:
            split.append(group)
            continue
        for age in ages:
            members = tuple(name for name in group.parameters if since[name] == age)
            split.append(dataclasses.replace(group, name=f"{group.name} since {phases[age].name}", parameters=members))
    return tuple(split)


def pick(config: RunConfig, phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The phases that a run is made of: those of `--phases`, or all of the system's. Raises UserError."""
    picked = _named(config, phases)
    if not config.steps and (len(picked) > 1 or picked[0].steps):
        raise UserError(
            "--steps 0 saves a model as it begins, in a run of one phase whose length is --steps; this run has"
            f" {', '.join(f'{phase.name} ({phase.steps:,} steps)' for phase in picked)}: give a number of steps"
        )
    return picked


def _named(config: RunConfig, phases: Sequence[Phase]) -> tuple[Phase, ...]:
    known = [phase.name for phase in phases]
    assert len(set(known)) == len(known), f"two phases have the same name: {known}"
    for flag, wanted in (("--phases", config.phases), ("--phase", () if config.phase is None else (config.phase,))):
        for name in wanted:
            if name not in known:
                raise UserError(f"{flag} {shown(name)}: not a phase of {config.recipe}: it has {', '.join(known)}")
    if not config.phases:
        return tuple(phases)
    if list(config.phases) != [name for name in known if name in config.phases]:
        raise UserError(
            f"--phases {' '.join(config.phases)}: phases follow each other as {', '.join(known)}: give each once, in"
            " this order"
        )
    if config.phase is not None and config.phase not in config.phases:
        raise UserError(f"--phase {config.phase}: --phases leaves it out: add it there, or leave --phases out")
    return tuple(phase for phase in phases if phase.name in config.phases)
