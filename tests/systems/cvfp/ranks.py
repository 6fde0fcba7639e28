"""Threads that stand for ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology


class Ranks:
    """In place of torch.distributed: the ranks are threads of this process."""

    ReduceOp = dist.ReduceOp

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.sent: list[Tensor] = [torch.empty(0)] * count
        self.place = threading.local()
        self.numbers = 0

    def _exchange(self, send: Tensor) -> list[Tensor]:
        self.sent[self.place.rank] = send.clone()
        self.barrier.wait()
        found = list(self.sent)
        self.barrier.wait()
        return found

    def all_gather(self, received: list[Tensor], send: Tensor) -> None:
        self.numbers = send.numel()
        for place, value in zip(received, self._exchange(send), strict=True):
            place.copy_(value)

    def all_reduce(self, value: Tensor, op: object) -> None:
        assert op == dist.ReduceOp.MAX
        value.copy_(torch.stack(self._exchange(value)).amax(0))

    def reduce_sums(self, sums: Mapping[str, Tensor], topology: Topology, device: torch.device) -> dict[str, Tensor]:
        """In place of that of pipeline.parallel.loss."""
        totals = torch.stack(self._exchange(torch.stack([value.double() for value in sums.values()]))).sum(0)
        return dict(zip(sums, totals, strict=True))

    def run(self, work: Callable[[Topology], Tensor]) -> list[Tensor]:
        results: list = [None] * len(self.sent)

        def body(rank: int) -> None:
            self.place.rank = rank
            try:
                results[rank] = work(Topology(rank, len(self.sent)))
            except BaseException as problem:
                results[rank] = problem
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(self.sent))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


class Together:
    """In place of a SyncPoint: nothing fails, and nothing is summed."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def __call__(self, *_: object) -> None: ...
