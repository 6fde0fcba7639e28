"""All ranks go on together, or all stop with the same reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.parallel.topology import Topology

T = TypeVar("T")


def raise_together(topology: Topology, problem: str | None) -> None:
    """Raises the first rank's problem as UserError on every rank. Collective."""
    problem = next((text for text in all_gather_object(topology, problem) if text is not None), None)
    if problem is not None:
        raise UserError(problem)


@contextlib.contextmanager
def shared_errors(topology: Topology) -> Iterator[None]:
    """Around what a rank may fail at by itself (a file, a package): its UserError or OSError is raised on all ranks.

    Collective at the block's end, so nothing inside may wait for other ranks. Any other exception ends this rank alone.
    """
    problem: str | None = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}: fix it, or name another"
    raise_together(topology, problem)


def all_gather_object(topology: Topology, value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Collective."""
    if topology.world == 1:
        return [value]
    everyone: list[Any] = [None] * topology.world
    dist.all_gather_object(everyone, value, group=topology.control)
    return everyone


def broadcast_object(topology: Topology, value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    if topology.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=topology.control)
    return box[0]
