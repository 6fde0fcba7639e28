"""`bench kernels`: every backend of the native ops, and their peers, at several shapes, in one run.

All contenders of a shape are warmed up and then timed in turn, `repeats` times over, so that a machine whose speed
drifts favours none of them. Figures are medians, with the span of the middle 60 %. FLOPs are those that the op's
definition asks for (docs/benchmarks.md), so that a backend which recomputes is not credited for it, and bytes are those
of the inputs, outputs and gradients, each moved once. `roof` is the least time that both can take on the device over
the time that was taken.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.contenders import computes, leaves_out, prepare, relative_error
from pipeline.bench.kernel_memory import both_passes, empty_cache, peak_ratios
from pipeline.bench.kernel_ops import Op, Shape, ops, parse_shape
from pipeline.bench.kernel_table import PASSES, render
from pipeline.bench.kernel_timing import sample, spread
from pipeline.bench.peers import PEERS, Run
from pipeline.commands.flags import parse_flags
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.host.hardware import Roof, on_gpu, roof
from pipeline.host.versions import versions
from pipeline.parallel.topology import Topology
from pipeline.runtime.ranks import describe_devices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SHAPES = {"cpu": ("1x2048x4x64", "1x8192x4x64", "1x32Kx4x64"), "cuda": ("1x8Kx16x128", "1x64Kx16x128")}


@dataclass(frozen=True)
class KernelOptions:
    """What is measured."""

    shapes: tuple[str, ...] = ()
    """Batch x tokens x heads x head dimension, as in 1x8192x4x64 or 1x64Kx16x128; none: three lengths."""
    ops: tuple[str, ...] = ("miras_scan",)
    """Ops; see docs/benchmarks.md."""
    backends: tuple[str, ...] = ()
    """Backends: torch, cpu, cuda, or none for peers alone; not given: torch and the native one of this device."""
    pieces: tuple[int, ...] = (2, 4)
    """Parts of the sequence for miras_scan_split, which is also measured whole."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    repeats: int = 7
    """Samples of every backend and shape, taken in turn."""
    threads: int = 0
    """CPU threads; 0: as many as torch takes."""
    peers: tuple[str, ...] = ("titans-pytorch", "fla-momentum", "fla-gated-delta")
    """Other packages, measured where they are installed: these, titans-pytorch/64, fla-momentum/16, or none."""
    memory: bool = True
    """Measure peak memory, on a CPU in processes of their own."""
    json: Path | None = None
    """File for the results."""


def _no_samples() -> dict[str, list[float]]:
    return {name: [] for name in PASSES}


@dataclass
class Contender:
    """A backend or a peer at one shape."""

    name: str
    run: Run
    samples: dict[str, list[float]] = field(default_factory=_no_samples)

    def call(self, name: str) -> None:
        """One of `PASSES`, once."""
        if name == PASSES[1]:
            both_passes(self.run)
        else:
            with torch.no_grad():
                self.run.forward()


def run_kernels(words: Sequence[str]) -> None:
    """The command: `bench kernels [flags]`."""
    options: KernelOptions = parse_flags(KernelOptions(), words, "mnemos bench kernels")
    device = torch.device("cuda" if on_gpu() else "cpu")
    shapes, chosen, backends = check(options, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    ceiling = roof(dtype)
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    for op in chosen:
        timed_rows = [row for shape in shapes for row in measure(op, shape, backends, dtype, device, options, notes)]
        if options.memory:
            _add_memory(timed_rows, op.name, shapes, dtype, device, notes)
        found += timed_rows
    # Before and after: other work on the machine only ever lowers what is measured.
    ceiling = ceiling.higher(roof(dtype))
    rows = [_with_rates(row, dtype, ceiling) for row in found]
    result = {
        "options": dataclasses.asdict(options),
        "machine": describe_devices(Topology()) | {"threads": torch.get_num_threads(), "vectors": _vectors()},
        "versions": versions() | {peer.package: peer.version for peer in PEERS},
        "roof": dataclasses.asdict(ceiling),
        "notes": list(dict.fromkeys(notes)),
        "rows": rows,
    }
    print(render(result))
    if options.json is not None:
        with writing(options.json):
            options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


def check(options: KernelOptions, device: torch.device) -> tuple[list[Shape], list[Op], list[str]]:
    """The shapes, ops and backends that the flags mean. Raises UserError."""
    known = ops()
    for name in options.ops:
        if name not in known:
            raise UserError(f"--ops has {name!r}: one of {', '.join(known)}")
    for name in options.backends:
        if name not in ("torch", "cpu", "cuda", "none"):
            raise UserError(f"--backends has {name!r}: one of torch, cpu, cuda, or none for peers alone")
        if name not in ("torch", "none", device.type):
            raise UserError(f"--backends has {name!r}: this run computes on {'a GPU' if on_gpu() else 'the CPU'}")
    for name in options.peers:
        if name not in (allowed := [*(peer.name for peer in PEERS), "none"]):
            raise UserError(f"--peers has {name!r}: one of {', '.join(allowed)}")
    for count in options.pieces:
        if count < 2:
            raise UserError(f"--pieces has {count}: give numbers above 1")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype is {options.dtype!r}: one of {', '.join(DTYPES)}")
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}: give a number above 0")
    if options.threads < 0:
        raise UserError(f"--threads is {options.threads}: give a number of threads, or 0 for torch's own choice")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    shapes = [parse_shape(text) for text in options.shapes or DEFAULT_SHAPES[device.type]]
    backends = list(dict.fromkeys(options.backends or ("torch", device.type)))
    for op in (known[name] for name in dict.fromkeys(options.ops)):
        for backend in (name for name in options.backends if name != "none"):
            for dim in dict.fromkeys(shape.dim for shape in shapes):
                _refuse(op, backend, dim, DTYPES[options.dtype], device)
    return shapes, [known[name] for name in dict.fromkeys(options.ops)], backends


def _refuse(op: Op, backend: str, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError for a backend that was asked for by name and cannot run."""
    if backend not in op.backends:
        raise UserError(f"--backends has {backend!r}: {op.name} has {', '.join(op.backends)}")
    try:
        op.call(op.inputs(Shape(1, 1, 1, dim), dtype, device), backend)
    except ValueError as error:
        raise UserError(f"--backends has {backend!r}: {op.name}: {error}") from None


def measure(
    op: Op,
    shape: Shape,
    backends: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    options: KernelOptions,
    notes: list[str],
) -> list[dict[str, Any]]:
    """Times of every backend and peer at a shape; appends to ``notes`` why one is left out."""
    contenders: list[Contender] = []
    errors: dict[str, float | None] = {}
    names = op.contenders(backends, options.pieces)
    for peer in PEERS:
        if peer.name not in options.peers or peer.op != op.name or device.type not in peer.devices:
            continue
        if peer.version is None:
            notes.append(f"{peer.package} is not installed")
        else:
            names.append(peer.name)

    def drop(name: str, error: Exception) -> bool:
        out = leaves_out(op.name, name, error)
        if out:
            notes.append(f"{name} at {shape}: {_reason(error)}")
        return out

    for name in names:
        try:
            errors[name] = relative_error(op, name, shape, dtype, device) if computes(op, name) else None
            contenders.append(_warmed_up(name, prepare(op.name, name, shape, dtype, device)))
            continue
        except Exception as error:
            if not drop(name, error):
                raise
        empty_cache(device)
    samples = {contender.name: contender.samples for contender in contenders}
    implementations = {contender.name: contender.run.implementation for contender in contenders}
    for each in PASSES:
        works = {contender.name: (partial(contender.call, each), contender.samples[each]) for contender in contenders}
        failed = sample(works, options.repeats, device, drop)
        del works
        contenders = [contender for contender in contenders if contender.name not in failed]
    return [
        {
            "op": op.name, "shape": str(shape), "dtype": options.dtype, "backend": name, "pass": each,
            **spread(taken[each]), "error": errors[name], "memory": None, "implementation": implementations[name],
        }
        for name, taken in samples.items() for each in PASSES if taken[each]
    ]  # fmt: skip


def _warmed_up(name: str, run: Run) -> Contender:
    contender = Contender(name, run)
    contender.call(PASSES[1])
    return contender


def _reason(error: Exception) -> str:
    """An error's message in one line; with its type, unless it is a ValueError of the op's own checks."""
    text = textwrap.shorten(str(error), 200, placeholder=" ...")
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}{text and ': '}{text}"


def _add_memory(
    rows: Sequence[dict[str, Any]],
    op: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    notes: list[str],
) -> None:
    names = list(dict.fromkeys(row["backend"] for row in rows))
    try:
        ratios = peak_ratios(op, names, shapes, dtype, device, torch.get_num_threads())
    except UserError as error:  # what was timed stays
        notes.append(str(error))
        return
    for row in rows:
        if row["pass"] == PASSES[1]:
            row["memory"] = ratios[row["backend"], parse_shape(row["shape"])]


def _with_rates(row: dict[str, Any], dtype: torch.dtype, ceiling: Roof) -> dict[str, Any]:
    """Adds time per token, FLOP/s, bytes/s and the share of the roof; of a peer that does other work, time alone."""
    op, shape, seconds = ops()[row["op"]], parse_shape(row["shape"]), row["seconds"]
    counted, passes = computes(op, row["backend"]), 1 if row["pass"] == PASSES[0] else 2
    flops = sum(op.flops(shape)[:passes]) if counted and op.flops is not None else None
    moved = sum(op.moved(shape, dtype)[:passes]) if counted else None
    least = None if flops is None or moved is None else ceiling.seconds(flops, moved)
    return row | {
        "us_per_token": 1e6 * seconds / (shape.batch * shape.tokens),
        "flops": flops,
        "bytes": moved,
        "flop_s": None if flops is None else flops / seconds,
        "byte_s": None if moved is None else moved / seconds,
        "roof": None if least is None else least / seconds,
    }


def _vectors() -> str | None:
    """The widest vector instructions that torch uses on this CPU."""
    return None if on_gpu() else torch.backends.cpu.get_cpu_capability()
