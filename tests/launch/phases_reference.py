"""What the phased toy system must give: plain PyTorch, one AdamW a phase on named parameters."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.batch import StatefulLoader
from pipeline.parallel.topology import Topology
from tests.toy_systems.phased import ROWS
from tests.toy_systems.phased.data import WIDTH, Endless, Pairs, epochs
from tests.toy_systems.phased.system import PhasedSystem, error_of_ones, remembered

RATES = {
    "A": lambda step, steps: step / 2 if step <= 2 else 0.2 + 0.4 * (1 + math.cos(math.pi * (step - 2) / (steps - 2))),
    "B": lambda step, steps: 0.25 + 0.75 * step / 2 if step <= 2 else 0.3 + 0.7 * (1 - (step - 2) / (steps - 2)),
    "C": lambda step, steps: 1.0,
}
ADAM = {"A": (0.05, (0.9, 0.95), 1e-8), "B": (0.02, (0.8, 0.99), 1e-6), "C": (0.03, (0.9, 0.95), 1e-8)}
GROUPS = {
    "A": [(["early.weight", "late.weight"], 1.0, 0.1), (["early.bias"], 0.5, 0.0)],
    "B": [(["late.weight", "late.bias"], 0.7, 0.0)],
    "C": [(["early.weight", "late.weight", "late.bias", "extra"], 1.0, 0.1)],
}


@dataclass
class Reference:
    """Step by step: phase, step within it, loss, rate; and the weights at each phase's end."""

    rows: list[tuple[str, int, float, float]] = field(default_factory=list)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def end_of(self, phase: str) -> int:
        """The last step of a phase, counted through the run."""
        return max(step for step, row in enumerate(self.rows, start=1) if row[0] == phase)


def reference(config: RunConfig, threshold: float, phases: str = "ABC", *, whole: bool = False) -> Reference:
    """All rows of a step at once, on one device."""
    found = Reference()
    system = PhasedSystem(config)
    model = system.build()
    system.initialise(model, Topology())
    named = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    memory = torch.zeros(ROWS, WIDTH)
    position = 0
    for count, phase in enumerate(phases, start=1):
        with torch.no_grad():
            begun = torch.stack([torch.tensor(float(count)), error_of_ones(model)])
        peak, betas, eps = ADAM[phase]
        groups_of = GROUPS[phase]
        if phase == "C" and whole:
            groups_of = [([*groups_of[0][0], "early.bias"], *groups_of[0][1:])]
        groups = [
            {"params": [named[name] for name in names], "weight_decay": decay, "scale": scale}
            for names, scale, decay in groups_of
        ]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas, eps=eps, foreach=False)
        trained = [name for names, _, _ in groups_of for name in names]
        for name in trained:
            if name in states:
                optimizer.state[named[name]] = states[name]
        if phase != "B":
            memory, position = torch.zeros(ROWS, WIDTH), 0
        loader = _loader(phase, config, position)
        for step in range(1, config.steps + 1):
            batch = loader.next_step()[0]
            position += ROWS
            loss = model(batch.inputs, batch.targets, memory) / batch.inputs.shape[:2].numel()
            memory = remembered(memory, batch)
            model.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = peak * group["scale"] * RATES[phase](step, config.steps)
            optimizer.step()
            found.rows.append((phase, step, float(loss.detach()), optimizer.param_groups[0]["lr"]))
            if phase == "A" and float(loss.detach()) < threshold:
                break
        found.weights[phase] = {name: parameter.detach().clone() for name, parameter in named.items()} | {
            "begun": begun
        }
        states = {name: optimizer.state[named[name]] for name in trained}
    return found


def _loader(phase: str, config: RunConfig, position: int) -> StatefulLoader[Pairs]:
    whole = dataclasses.replace(config, batch_size=ROWS, grad_accum=1)
    if phase == "C":
        return epochs(whole, Topology())
    loader = Endless({"A": "one", "B": "two"}[phase], whole, Topology())
    loader.position = position
    return loader
