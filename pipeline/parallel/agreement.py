"""All ranks go on together, or all stop with the same reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.system import Batch, StatefulLoader

T = TypeVar("T")


def agree(topology: Topology, problem: str | None) -> None:
    """Raises the first rank's problem as UserError on every rank. Collective."""
    if topology.world > 1:
        everyone: list[str | None] = [None] * topology.world
        dist.all_gather_object(everyone, problem)
        problem = next((text for text in everyone if text is not None), None)
    if problem is not None:
        raise UserError(problem)


def together(topology: Topology, part: Callable[[], T]) -> T:
    """Runs what a rank may fail at by itself (a file, a package); one rank's UserError is raised on all. Collective."""
    problem: str | None = None
    result: T | None = None
    try:
        result = part()
    except UserError as error:
        problem = str(error)
    agree(topology, problem)
    return cast(T, result)


def agree_quickly(topology: Topology, problem: str | None, device: torch.device) -> None:
    """As `agree`, for every step: one number is reduced, and the texts travel only when there is one."""
    if topology.world > 1:
        failed = torch.tensor(float(problem is not None), device=device)
        dist.all_reduce(failed)
        if not failed.item():
            return
    agree(topology, problem)


def next_step(loader: StatefulLoader, topology: Topology, device: torch.device) -> list[Batch]:
    """A loader's next micro-batches; a document that one rank cannot use stops all of them. Collective."""
    problem: str | None = None
    batches: list[Batch] = []
    try:
        batches = loader.next_step()
    except UserError as error:
        problem = str(error)
    agree_quickly(topology, problem, device)
    return batches


def from_main(topology: Topology, value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    if topology.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
