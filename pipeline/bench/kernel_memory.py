"""The most memory that a forward and a backward pass hold, as `bench kernels` measures it.

On a GPU it is what the allocator counts. On a CPU it is the resident set's high-water mark, which Linux can reset: what
native code takes for itself is in it, and no allocator is asked. That needs a process of its own, in which every larger
block is mapped by itself and given back at once, so that the mark is what is held and not what has been freed.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.bench.contenders import leaves_out, prepare
from pipeline.bench.kernel_ops import Shape, parse_shape
from pipeline.bench.peers import Run
from pipeline.errors import UserError

MARK = "kernel-memory "
"""Starts the line that a case prints for its parent."""
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
"""Every larger block by itself, and in small pages."""
SMALLEST = 2**21
"""Bytes of inputs and output below which the blocks are too small to be mapped by themselves."""
WARM_UP = 256
"""Tokens of the run that loads what is loaded once."""


def both_passes(run: Run) -> int:
    """Runs the forward and the backward pass; returns the bytes of the output."""
    y = run.forward()
    torch.autograd.grad(y, run.leaves, torch.ones_like(y), allow_unused=True)
    return y.nbytes


def peak_ratios(
    op: str, contenders: Sequence[str], shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, threads: int
) -> dict[tuple[str, Shape], float | None]:
    """Peak bytes of a forward and backward pass over the bytes of the op's inputs and output, for every shape.

    The peak counts the inputs, the output, its gradient, the gradients of the inputs, and whatever is held besides.
    None where it cannot be measured. Raises UserError where the process that measures it fails.
    """
    keys = list(itertools.product(contenders, shapes))
    if device.type == "cuda":
        return {(name, shape): _on_gpu(op, name, shape, dtype, device) for name, shape in keys}
    if not _can_reset():
        return dict.fromkeys(keys)
    case = {
        "op": op, "contenders": list(contenders), "shapes": list(map(str, shapes)),
        "dtype": str(dtype).removeprefix("torch."), "threads": threads,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "bench", "kernels-case", json.dumps(case)],
        capture_output=True, text=True, env={**os.environ, **PAGES}, check=False,
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        tail = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        why = f"killed by signal {-done.returncode}" if done.returncode < 0 else tail[-1]
        raise UserError(f"measuring the memory of {op} failed: {why}")
    return dict(zip(keys, json.loads(line.removeprefix(MARK)), strict=True))


def run_case(words: Sequence[str]) -> None:
    """The command behind `peak_ratios`; prints a ratio per contender and shape."""
    case = json.loads(words[0])
    torch.set_num_threads(case["threads"])
    dtype, device = getattr(torch, case["dtype"]), torch.device("cpu")
    ratios: list[float | None] = []
    for name, text in itertools.product(case["contenders"], case["shapes"]):
        shape = parse_shape(text)
        short = Shape(shape.batch, min(shape.tokens, WARM_UP), shape.heads, shape.dim)
        try:
            both_passes(prepare(case["op"], name, short, dtype, device))
            ratios.append(_resident(prepare(case["op"], name, shape, dtype, device)))
        except Exception as error:
            if not leaves_out(case["op"], name, error):
                raise
            ratios.append(None)
    print(MARK + json.dumps(ratios), flush=True)


def _resident(run: Run) -> float | None:
    inputs = sum(x.nbytes for x in run.leaves)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    output = both_passes(run)
    if inputs + output < SMALLEST:
        return None
    return (_status("VmHWM") - before + inputs) / (inputs + output)


def _on_gpu(op: str, contender: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> float | None:
    try:
        run = prepare(op, contender, shape, dtype, device)
        both_passes(run)
        inputs = sum(x.nbytes for x in run.leaves)
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = both_passes(run)
        return (torch.cuda.max_memory_allocated(device) - before + inputs) / (inputs + output)
    except Exception as error:
        if not leaves_out(op, contender, error):
            raise
    empty_cache(device)
    return None


def empty_cache(device: torch.device) -> None:
    """Gives back what a contender that was left out has held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _can_reset() -> bool:
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def _status(key: str) -> int:
    """Bytes that /proc says of this process."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
