"""Started by test_scan.py on every rank: the scan over sequence ranks against the whole scan in one process.

Usage: scan_main OUT. Rank 0 writes OUT/result.json: the relative RMSE of every value and gradient, for every case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.cli import without_local_rank
from pipeline.config import ParallelConfig
from pipeline.ops import miras_scan
from pipeline.parallel.scan import sequence_scan
from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import start, stop
from tests.launch.parity_main import base
from tests.ops.scan_cases import NAMES, make

OUTPUTS = ("y", "M", "S")


def parts(total: int, ranks: int, uneven: bool) -> list[int]:
    """Tokens of each rank."""
    if not uneven:
        return [total // ranks] * ranks
    weights = list(range(1, ranks + 1))
    sizes = [total * weight // sum(weights) for weight in weights]
    sizes[-1] += total - sum(sizes)
    return sizes


def cases(ranks: int) -> dict[str, dict[str, Any]]:
    border = 96 // ranks
    found: dict[str, dict[str, Any]] = {
        f"{tokens} tokens": {"tokens": tokens} for tokens in (ranks, 40 * ranks, 260 * ranks)
    }
    found["parts of different lengths"] = {"tokens": 150, "uneven": True}
    for name, starts in {
        "a segment starts at a border of ranks": (border,),
        "and just before and after it": (border - 1, border, border + 1),
        "at every border": tuple(border * rank for rank in range(1, ranks)),
        "inside a part": (border // 2, border + border // 3),
    }.items():
        found[name] = {"tokens": 96, "starts": starts}
    found["no state"] = {"tokens": 96, "state": False}
    found["delta"] = {"tokens": 96, "rule": "delta"}
    found["delta, segments"] = {"tokens": 96, "rule": "delta", "starts": (border, border + 5)}
    found["gates at their ends"] = {"tokens": 96, "gates": "any", "dtype": torch.float64}
    found["the returned state alone"] = {"tokens": 96, "only_state": True}
    found["heads of 32"] = {"tokens": 70 * ranks, "dim": 32, "starts": (5, border)}
    found["bfloat16"] = {"tokens": 96, "dtype": torch.bfloat16}
    return found


def run_case(topology: Topology, **case: Any) -> dict[str, float | bool]:
    """Errors of one case on this rank, the same on every rank."""
    tokens, rule = case["tokens"], case.get("rule", "titans")
    dtype = case.get("dtype", torch.float32)
    key_dim, value_dim = (case["dim"],) * 2 if "dim" in case else (16, 8)
    exact = make(2, tokens, 3, key_dim, value_dim, gates=case.get("gates", "model"), dtype=torch.float64)
    # The reference sees the very same numbers in float64.
    kinds = [dtype] * 3 + [torch.float64 if dtype == torch.float64 else torch.float32] * 5
    held = [x.detach().to(kind) for x, kind in zip(exact, kinds, strict=True)]
    whole = [x.double().requires_grad_() for x in held]
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    ids[:, list(case.get("starts", ()))] = 1
    ids = ids.cumsum(dim=1) % 2
    segment_ids = ids if "starts" in case else None
    state = case.get("state", True)

    generator = torch.Generator().manual_seed(5)
    y, after = miras_scan(*whole[:6], state=(whole[6], whole[7]) if state else None, segment_ids=segment_ids, rule=rule)
    outputs = [y, *after]
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    if case.get("only_state"):
        cotangents[0].zero_()
    expected = torch.autograd.grad(outputs, whole, cotangents, materialize_grads=True)

    sizes = parts(tokens, topology.sequence, case.get("uneven", False))
    begin = sum(sizes[: topology.sequence_rank])
    mine = slice(begin, begin + sizes[topology.sequence_rank])
    x = [z[:, mine] if index < 6 else z for index, z in enumerate(held)]
    x = [z.clone().requires_grad_() for z in x]
    my_y, my_after = sequence_scan(
        *x[:6], topology=topology, state=(x[6], x[7]) if state else None,
        segment_ids=None if segment_ids is None else segment_ids[:, mine], rule=rule,
    )  # fmt: skip
    # The gradient of what all ranks hold is the sum of theirs: each asks for a different share of it.
    share = 2 * (topology.sequence_rank + 1) / (topology.sequence * (topology.sequence + 1))
    given = [cotangents[0][:, mine].to(my_y.dtype), *(share * z.to(my_after[0].dtype) for z in cotangents[1:])]
    found = torch.autograd.grad([my_y, *my_after], x, given, materialize_grads=True)

    gathered = [join(z, sizes, topology) for z in (my_y, *found[:6])]
    names = [OUTPUTS[0], *NAMES[:6]]
    result: dict[str, float | bool] = {
        name: error(a, b) for name, a, b in zip(names, gathered, [outputs[0], *expected[:6]], strict=True)
    }
    for name, a, b in zip(OUTPUTS[1:], my_after, after, strict=True):
        everyone = each(a, topology)
        result[name] = error(a, b)
        result[f"{name} is the same on every rank"] = all(torch.equal(a, other) for other in everyone)
    if state:
        for name, a, b in zip(NAMES[6:], found[6:], expected[6:], strict=True):
            total = each(a, topology)
            result[name] = error(sum(part.double() for part in total), b)
            result[f"the gradient of {name} is on the first rank"] = not any(part.any() for part in total[1:])
    return result


def each(x: Tensor, topology: Topology) -> list[Tensor]:
    """A tensor from every sequence rank."""
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(topology.sequence)]
    dist.all_gather(received, x.detach().contiguous(), group=topology.sequence_group)
    return received


def join(x: Tensor, sizes: Sequence[int], topology: Topology) -> Tensor:
    """The whole sequence from its parts."""
    padded = x.new_zeros(x.shape[0], max(sizes), *x.shape[2:])
    padded[:, : x.shape[1]] = x.detach()
    return torch.cat([part[:, :size] for part, size in zip(each(padded, topology), sizes, strict=True)], dim=1)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMSE; of what must be zero, its size."""
    difference, size = (actual.detach().double() - expected.detach()).norm(), expected.detach().norm()
    return float(difference / size) if size > 0 else float(difference)


def main() -> None:
    (out,) = map(Path, without_local_rank(sys.argv[1:]))
    ranks = int(os.environ["WORLD_SIZE"])
    topology = start(dataclasses.replace(base(), parallel=ParallelConfig(sequence=ranks)))
    found = {name: run_case(topology, **case) for name, case in cases(ranks).items()}
    if topology.rank == 0:
        (out / "result.json").write_text(json.dumps(found))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
