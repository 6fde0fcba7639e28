"""How long each CUDA kernel of `miras_scan` should take on a device: arithmetic from the sources, not a measurement.

A kernel takes as long as the slowest of what it needs:

- memory: every tensor moved once between the device's memory and its cores;
- L2: what the blocks read, over and over, through the second cache;
- tensor cores: the ``mma.sync`` instructions of its warps, which reach MMA_SHARE of a dense product's rate;
- latency: in the two recurrences, which work on one chunk after another, CYCLES per tensor instruction of a warp and
  chunk. That is counted from the instructions and barriers around them, and is the least certain part.

What is left out (the start of a launch, barriers in the other kernels, loads that nothing hides) makes a real kernel
slower. kernels/miras_scan/cuda/README.md has the table for 64K tokens, 16 heads of 128 and bfloat16 on an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.ops.scan_native import interval

CHUNK = 64
SLICE = 16
"""Columns of v that a block of a recurrence carries."""
INSTRUCTION_FLOPS = 4096
"""Of an m16n8k16 in bfloat16; an m16n8k8 in tf32 does half of it in the same time."""
MMA_SHARE = 0.62
"""Of the tensor cores' rate in a dense product (wgmma), for `mma.sync` on Hopper."""
CYCLES = 15.4
"""Clock cycles that a step of a recurrence takes, for each tensor instruction of a warp in it."""

KERNELS = {
    "prepare, forward": r"\bprepare_kernel<.*(\bfalse|\(bool\)0)>",
    "states": r"\bstates_kernel<",
    "outputs": r"\boutputs_kernel<",
    "prepare, backward": r"\bprepare_kernel<.*(\btrue|\(bool\)1)>",
    "replay": r"\breplay_kernel<",
    "adjoint": r"\badjoint_kernel<",
    "gradients": r"\bgradients_kernel<",
}
"""The kernels of a forward and a backward pass in the order they run in; the regular expression finds one among the
demangled names that a profiler shows."""


@dataclass(frozen=True)
class KernelEstimate:
    """One kernel over a whole call, all spans of it."""

    bytes: float
    """Moved from and to the device's memory."""
    l2_bytes: float
    """Read by its blocks."""
    instructions: float
    """`mma.sync` instructions of all warps."""
    latency: float
    """Seconds of its chunks one after another; 0 where it works on all of them at once."""
    bandwidth: float
    """Bytes/s of memory."""
    l2_bandwidth: float
    """Bytes/s of reading from L2."""
    tensor_flops: float
    """FLOP/s of a dense product."""

    @property
    def flops(self) -> float:
        """Of the instructions, each counted as the bfloat16 product that takes as long."""
        return INSTRUCTION_FLOPS * self.instructions

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each thing it needs takes by itself."""
        return {
            "memory": self.bytes / self.bandwidth,
            "L2": self.l2_bytes / self.l2_bandwidth,
            "tensor cores": self.flops / (MMA_SHARE * self.tensor_flops),
            "latency": self.latency,
        }

    @property
    def seconds(self) -> float:
        """What the kernel should take: the longest of its `times`."""
        return max(self.times.values())

    @property
    def bound(self) -> str:
        """Which of its `times` that is."""
        return max(self.times, key=self.times.__getitem__)


def predict(
    batch: int,
    tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: str,
    *,
    bandwidth: float,
    l2_bandwidth: float,
    tensor_flops: float,
    multiprocessors: int,
    clock: float,
) -> dict[str, KernelEstimate]:
    """Estimates for the kernels of a forward and a backward pass, by the names of `KERNELS`; those that do not run (the
    replay, where every chunk's state is kept) are left out.

    Args:
        batch, tokens, heads, key_dim, value_dim: the shape of the call.
        dtype: of q, k and v, ``bfloat16`` or ``float32``.
        bandwidth: of the device's memory, bytes/s, as a copy reaches it (reads and writes counted).
        l2_bandwidth: of reading from L2, bytes/s.
        tensor_flops: FLOP/s of a dense bfloat16 product.
        multiprocessors: of the device.
        clock: of the multiprocessors, Hz.
    """
    rows, chunks = batch * heads, -(-tokens // CHUNK)
    every = interval(key_dim, getattr(torch, dtype)) // CHUNK
    kept = -(-chunks // every)
    moved, read = _traffic(key_dim, value_dim, 2 if dtype == "bfloat16" else 4, every, kept / chunks)
    counted = instructions(key_dim, value_dim, dtype)
    # Of the chunks between two kept states, the last is not run through again.
    counted["replay"] *= 1 - kept / chunks
    warps = 4 if key_dim >= 64 else 2
    slices = value_dim // SLICE
    waves = math.ceil(rows * slices / multiprocessors)
    step = {name: CYCLES * counted[name] / (slices * warps) / clock for name in ("states", "adjoint")}
    return {
        name: KernelEstimate(
            bytes=rows * chunks * moved[name],
            l2_bytes=rows * chunks * read[name],
            instructions=rows * chunks * counted[name],
            latency=waves * chunks * step.get(name, 0.0),
            bandwidth=bandwidth,
            l2_bandwidth=l2_bandwidth,
            tensor_flops=tensor_flops,
        )
        for name in KERNELS
        if name != "replay" or every > 1
    }


def instructions(key_dim: int, value_dim: int, dtype: str) -> dict[str, float]:
    """Tensor instructions for one chunk of a row, of all warps; for `replay`, for a chunk that it advances over.

    A product of two tiles of 16 x 16 and 16 x 8 takes one where both are inputs in bfloat16, two where one or both are
    values, and six in float32 (kernels/miras_scan/cuda/fragments.cuh).
    """
    inputs, mixed, values = (1, 2, 2) if dtype == "bfloat16" else (6, 6, 6)
    keys, slices = key_dim // 16, value_dim // SLICE
    triangle = 10  # blocks of 16 x 16 on and below the diagonal of a chunk
    pairs = triangle * keys * 2 * 2 * inputs
    read = update = 16 * keys * mixed  # a slice of both states against a chunk's keys
    solve = (20 if key_dim >= 64 else 24) * values  # two warps skip less of the triangle than four
    return {
        "prepare, forward": pairs,
        "states": slices * (read + solve + update),
        "outputs": slices * (16 * keys * mixed + 2 * triangle * values),
        "prepare, backward": pairs + -(-value_dim // 64) * 8 * triangle * mixed,
        "replay": slices * update,
        "adjoint": slices * (read + solve + 2 * update),
        "gradients": 8 * slices * keys * (2 * mixed + 4 * values)
        + 2 * triangle * slices * (mixed + values)
        + pairs
        + 2 * keys * mixed * (2 * triangle + 16),
    }


def _traffic(
    key_dim: int, value_dim: int, size: int, every: int, kept: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per chunk of a row that each kernel moves from and to memory, and those that its blocks read.

    ``size``: bytes of an element of q. ``kept``: states kept per chunk, one in ``every`` chunks.
    """
    q, v = CHUNK * key_dim * size, CHUNK * value_dim * size  # so are k, and y and dY
    gates, weights = CHUNK * 12, 8 * CHUNK * 4
    square, triangle = CHUNK * CHUNK * 4, 10 * 256 * 4
    residuals = update = CHUNK * value_dim * 4
    states = 8 * key_dim * value_dim
    slices, columns = value_dim // SLICE, -(-value_dim // 64)
    advanced = 1 - kept
    given = {
        "prepare, forward": 2 * q + gates,
        "states": q + v + square + weights,
        "outputs": q + triangle + 512 + states + residuals,
        "prepare, backward": 2 * q + v + gates,
        "replay": states * kept + (q + weights + residuals) * advanced,
        "adjoint": 2 * q + v + square + weights + update,
        "gradients": 2 * q + v + residuals + update + 2 * states + gates,
    }
    made = {
        "prepare, forward": square + triangle + weights,
        "states": states + residuals + (states * kept if every > 1 else 0),
        "outputs": v,
        "prepare, backward": square + update + weights,
        "replay": states,
        "adjoint": update + states,
        "gradients": 2 * q + v + gates,
    }
    # Blocks of other slices or columns read the same keys, squares and triangles; `gradients` reads its states five
    # times and its tiles three times.
    read = given | {
        "states": given["states"] + (slices - 1) * (q + square + weights),
        "outputs": given["outputs"] + (columns - 1) * (q + triangle + 512),
        "replay": given["replay"] + (slices - 1) * (q + weights) * advanced,
        "adjoint": given["adjoint"] + (slices - 1) * (2 * q + square + weights),
        "gradients": 2 * q + 3 * (v + residuals + update) + 5 * states + gates,
    }
    return {name: given[name] + made[name] for name in given}, read
