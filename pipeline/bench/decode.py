"""`bench decode`: one token of the memory op, beside one pass over the memories that it changes.

A step reads and writes M and S once, and little else: that is its floor. It is measured in the same run, by a
multiplication in place of all M and S with 1, and every step's time is given as a multiple of it, taken within a round,
so that a machine whose speed drifts favours neither.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.bench.kernel_table import WIDTH
from pipeline.bench.kernel_timing import sample, spread
from pipeline.commands.flags import parse_flags
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.host.hardware import on_gpu
from pipeline.host.versions import versions
from pipeline.ops.memory_step import memory_step
from pipeline.parallel.topology import Topology
from pipeline.runtime.ranks import describe_devices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOOR = "read and write"
GOAL = 3.0
"""The most that a native step should take, as a multiple of the floor."""


@dataclass(frozen=True)
class DecodeOptions:
    """What is measured."""

    shapes: tuple[str, ...] = ("1x8x64", "1x16x128")
    """Rows x heads x head dimension of a layer's memories."""
    layers: tuple[int, ...] = (1,)
    """Layers that are stepped in turn, each with memories of its own: so many that they leave the caches, say 64."""
    dtype: str = "float32"
    """Of queries, keys and values: float32 or bfloat16. The memories are float32."""
    repeats: int = 25
    """Samples of every backend, taken in turn."""
    threads: int = 0
    """CPU threads; 0: as many as torch takes."""
    json: Path | None = None
    """File for the results."""


@dataclass(frozen=True)
class Shape:
    """Rows x heads x dimension of a head."""

    rows: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.heads}x{self.dim}"

    @property
    def moved(self) -> int:
        """Bytes of a step: M and S, float32, read and written."""
        return 16 * self.rows * self.heads * self.dim**2


def parse_shape(text: str) -> Shape:
    """A shape as 1x16x128. Raises UserError."""
    words = text.split("x")
    if len(words) != 3 or not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise UserError(f"--shapes has {text!r}: write rows x heads x head dimension, as in 1x16x128")
    return Shape(*map(int, words))


def run_decode(words: Sequence[str]) -> None:
    """The command: `bench decode [flags]`."""
    options: DecodeOptions = parse_flags(DecodeOptions(), words, "mnemos bench decode")
    shapes = _check(options)
    device = torch.device("cuda" if on_gpu() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for shape in shapes:
        for layers in options.layers:
            rows += measure(shape, layers, options, device, notes)
    result = {
        "options": dataclasses.asdict(options),
        "machine": describe_devices(Topology()) | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "notes": list(dict.fromkeys(notes)),
        "rows": rows,
    }
    print(render(result))
    if options.json is not None:
        with writing(options.json):
            options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


def _check(options: DecodeOptions) -> list[Shape]:
    """The shapes that the flags mean. Raises UserError."""
    shapes = [parse_shape(text) for text in options.shapes]
    if not shapes:
        raise UserError("--shapes is empty: write rows x heads x head dimension, as in 1x16x128")
    if not options.layers or min(options.layers) < 1:
        raise UserError(f"--layers is {' '.join(map(str, options.layers)) or 'empty'}: give numbers above 0")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype is {options.dtype!r}: one of {', '.join(DTYPES)}")
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}: give a number above 0")
    if options.threads < 0:
        raise UserError(f"--threads is {options.threads}: give a number of threads, or 0 for torch's own choice")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    return shapes


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """q, k, v, alpha, eta, theta and (M, S) [2, rows, heads, dim, dim]; gates where the memory cannot grow."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.rows, shape.heads)
    q, k, v = (torch.randn(*size, shape.dim, generator=generator) for _ in range(3))
    alpha, beta = (torch.rand(size, generator=generator) for _ in range(2))
    eta = torch.full(size, 0.5)
    states = torch.randn(2, *size, shape.dim, shape.dim, generator=generator) / shape.dim
    tokens = [x.to(device, dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
    return [*tokens, *(x.to(device) for x in (0.01 * alpha, eta, 0.9 * beta * (1 - eta) ** 2, states))]


def measure(
    shape: Shape, layers: int, options: DecodeOptions, device: torch.device, notes: list[str]
) -> list[dict[str, Any]]:
    """Times of the floor and of every backend at a shape; appends to ``notes`` why one is left out."""
    dtype = DTYPES[options.dtype]
    *tokens, states = inputs(shape, dtype, device)
    all_states = [states.clone() for _ in range(layers)]
    out = torch.empty_like(tokens[2])

    def step(backend: str) -> Callable[[], object]:
        pairs = [(each[0], each[1]) for each in all_states]

        def token() -> None:
            for memory, momentum in pairs:
                memory_step(*tokens, memory, momentum, out=out, backend=backend)  # type: ignore[arg-type, misc]

        return token

    def pass_over() -> None:
        for each in all_states:
            each.mul_(1.0)

    works: dict[str, Callable[[], object]] = {FLOOR: pass_over}
    errors: dict[str, float] = {}
    with torch.no_grad():
        for backend in ("torch", device.type):
            try:
                errors[backend] = step_error(shape, dtype, device, backend)
            except ValueError as error:
                notes.append(f"{backend} at {shape}: {error}")
                continue
            works[backend] = step(backend)
        samples: dict[str, list[float]] = {name: [] for name in works}
        sample({name: (work, samples[name]) for name, work in works.items()}, options.repeats, device, _keep)
    rows = []
    for name, seconds in samples.items():
        figures = spread([each / layers for each in seconds])
        ratios = [mine / floor for mine, floor in zip(seconds, samples[FLOOR], strict=False)]
        rows.append(
            {
                "shape": str(shape), "layers": layers, "dtype": options.dtype, "backend": name, **figures,
                "bytes": shape.moved, "byte_s": shape.moved / figures["seconds"],
                "floors": statistics.median(ratios), "goal": GOAL if name == device.type else None,
                "error": errors.get(name),
            }
        )  # fmt: skip
    return rows


def _keep(name: str, error: Exception) -> bool:
    """No backend that has run once is left out."""
    return False


def step_error(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> float:
    """The largest relative RMSE of a read or a state after one step, against PyTorch in float64 on the CPU.

    Raises ValueError where the backend does not take the inputs.
    """
    x = inputs(shape, dtype, device, seed=1)
    wide = [each.cpu().double() for each in x]
    results = []
    for *tokens, states in (wide, x):
        chosen = "torch" if not results else backend
        y = memory_step(*tokens, states[0], states[1], backend=chosen)  # type: ignore[arg-type, misc]
        results.append([y, states[0], states[1]])
    pairs = zip(*results, strict=True)
    return max(float((found.cpu().double() - wanted).norm() / wanted.norm()) for wanted, found in pairs)


HEAD = f"{'backend':<16} {'us':>9} {'20-80 %':>17} {'GB/s':>7} {'x floor':>8} {'goal':>5} {'error':>8}"


def render(result: dict[str, Any]) -> str:
    """The results as tables under the machine and the versions."""
    device = result["machine"]["device"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    where = device["name"] if device["kind"] == "cuda" else f"{device['name']}, {result['machine']['threads']} threads"
    lines = textwrap.wrap(f"{where}; {used}", WIDTH)
    previous = None
    for row in result["rows"]:
        group = (row["shape"], row["layers"])
        if group != previous:
            in_turn = "" if row["layers"] == 1 else f", {row['layers']} layers in turn"
            lines += ["", f"memory_step {row['shape']} {row['dtype']}{in_turn}, a token of a layer", HEAD]
            previous = group
        cells = [
            f"{row['backend']:<16} {1e6 * row['seconds']:>9.1f}",
            f"{1e6 * row['low']:.1f}-{1e6 * row['high']:.1f}".rjust(17),
            f"{row['byte_s'] / 1e9:>7.1f} {row['floors']:>7.2f}x",
            "-".rjust(5) if row["goal"] is None else f"{row['goal']:>4.0f}x",
            "-".rjust(8) if row["error"] is None else f"{row['error']:>8.1e}",
        ]
        lines.append(" ".join(cells))
    notes = [line for note in result["notes"] for line in textwrap.wrap(f"left out: {note}", WIDTH)]
    lines += [""] * bool(notes) + notes
    return "\n".join(lines)
