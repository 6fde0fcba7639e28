"""Two loaders: streams without an end, and epochs of a few examples that are shuffled anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.epochs import EpochLoader
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import generator_for

WIDTH, TARGETS = 4, 5
EXAMPLES = 7
"""Of an epoch; no multiple of a step's rows."""


@dataclass(frozen=True)
class Pairs:
    """inputs [rows, T, 4], targets [rows, T, 5]: whole sequences."""

    inputs: Tensor
    targets: Tensor

    @property
    def rows(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.inputs.to(device), self.targets.to(device))


def pair(seed: int, name: str, length: int) -> tuple[Tensor, Tensor]:
    """A sequence and what is to be made of it; the name of the data decides both."""
    inputs = torch.randn(length, WIDTH, generator=generator_for(seed, name))
    teacher = torch.randn(WIDTH, TARGETS, generator=generator_for(seed, name.partition("/")[0]))
    return inputs, torch.tanh(inputs @ teacher) + 0.5


class Endless:
    """Rows of a step by micro-batch, from a position that counts the rows of all ranks. Row i of every step belongs to
    stream i."""

    def __init__(self, name: str, config: RunConfig, topology: Topology) -> None:
        self.name, self.config, self.topology = name, config, topology
        self.rows = config.batch_size * config.grad_accum * topology.data
        self.position = 0

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """By its number in the stream of all rows."""
        return pair(self.config.seed, f"{self.name}/{number}", self.config.sequence_length)

    def next_step(self) -> list[Pairs]:
        config, found = self.config, []
        for micro in range(config.grad_accum):
            first = self.position + (self.topology.data_rank * config.grad_accum + micro) * config.batch_size
            pairs = [self.row(first + row) for row in range(config.batch_size)]
            found.append(Pairs(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])))
        self.position += self.rows
        return found

    def describe(self) -> str:
        return f"{self.name}, made up"

    def reset(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"streams": {}, "position": self.position, "fingerprint": {"seed": self.config.seed, "rows": self.rows}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.state_dict()["fingerprint"]:
            raise UserError("--seed: another one than the checkpoint's")
        self.position = state["position"]


def epochs(config: RunConfig, topology: Topology) -> EpochLoader[Pairs]:
    """A few examples, in another order in each epoch; the last rows of an epoch share a step with the next one's."""
    name = "three"
    return EpochLoader(
        [pair(config.seed, f"{name}/{number}", config.sequence_length) for number in range(EXAMPLES)],
        lambda pairs, rows: Pairs(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])),
        name=name, fingerprint={"name": name}, batch_size=config.batch_size, grad_accum=config.grad_accum,
        data_rank=topology.data_rank, data_degree=topology.data, seed=config.seed,
    )  # fmt: skip
