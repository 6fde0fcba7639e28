"""Where a rank stands: data x sequence, sequence ranks next to each other so that they share a node."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import UserError


@dataclass(frozen=True)
class Topology:
    """The layout of ranks. `rank = data_rank * sequence + sequence_rank`."""

    rank: int = 0
    world: int = 1
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = None
    """Ranks that share this rank's sequences; None when the sequence degree is 1."""
    local_rank: int = 0
    nodes: int = 1
    control: dist.ProcessGroup | None = None
    """All ranks, over the host's network, for what is not tensors of a device; None: the default group is that."""

    @property
    def data(self) -> int:
        return self.world // self.sequence

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence

    def shard(self, length: int) -> slice:
        """This rank's part of a sequence of `length` tokens."""
        part = length // self.sequence
        return slice(self.sequence_rank * part, (self.sequence_rank + 1) * part)

    def heads(self, count: int) -> slice:
        """This rank's part of `count` heads after the exchange."""
        part = count // self.sequence
        return slice(self.sequence_rank * part, (self.sequence_rank + 1) * part)


def check_degrees(world: int, sequence: int) -> None:
    """Raises UserError when the ranks cannot be laid out as data x sequence."""
    if world % sequence:
        raise UserError(
            f"--parallel.sequence {sequence} does not divide the {world} ranks: choose a divisor of {world},"
            " or another number of ranks"
        )


def create_topology(
    sequence: int, *, local_rank: int = 0, nodes: int = 1, timeout: timedelta | None = None
) -> Topology:
    """Lays the ranks of the initialised process group out; every rank calls this with the same degree."""
    world, rank = dist.get_world_size(), dist.get_rank()
    check_degrees(world, sequence)
    group = None
    if sequence > 1:
        for first in range(0, world, sequence):
            candidate = dist.new_group(list(range(first, first + sequence)), timeout=timeout)
            if first <= rank < first + sequence:
                group = candidate
    on_host = dist.get_backend() == dist.Backend.GLOO
    control = None if on_host else dist.new_group(backend="gloo", timeout=timeout)
    return Topology(rank, world, sequence, group, local_rank, nodes, control)


def limit_waits(timeout: timedelta) -> None:
    """Every process group of this rank gives up after `timeout`, those that DeepSpeed makes for itself included.

    A group is made with its backend's default, 10 minutes with NCCL, whatever the first group was given: the ranks that
    wait for a stalled one would be aborted long before the heartbeat can name it.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
