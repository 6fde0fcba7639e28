"""All ranks go on together, or all stop with the same reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.parallel.topology import Topology

T = TypeVar("T")


def agree(topology: Topology, problem: str | None) -> None:
    """Raises the first rank's problem as UserError on every rank. Collective."""
    problem = next((text for text in from_all(topology, problem) if text is not None), None)
    if problem is not None:
        raise UserError(problem)


def together(topology: Topology, part: Callable[[], T]) -> T:
    """Runs what a rank may fail at by itself (a file, a package); its UserError is raised on all. Collective."""
    problem: str | None = None
    result: T | None = None
    try:
        result = part()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}: mend it, or name another"
    agree(topology, problem)
    return cast(T, result)


def from_all(topology: Topology, value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Collective."""
    if topology.world == 1:
        return [value]
    everyone: list[Any] = [None] * topology.world
    dist.all_gather_object(everyone, value, group=topology.control)
    return everyone


def from_main(topology: Topology, value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    if topology.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=topology.control)
    return box[0]
