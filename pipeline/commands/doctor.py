"""What this machine has, as far as this project cares: devices, versions, backends, compilers, and what to fix.

Nothing here may fail because something is missing: what cannot be found is None, and what that costs is a warning.
DeepSpeed is looked at from outside (its version, its built operation), because importing it picks an accelerator.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.commands.flags import take
from pipeline.errors import DeviceLostError, UserError
from pipeline.host.local import Machine
from pipeline.host.package import PACKAGE, how_to_set_up

PACKAGES = (
    *("torch", "triton", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "einops", "safetensors"),
    *("sentencepiece", "tyro", "pydantic", "psutil", "matplotlib", "tensorboard", "ninja"),
    *("flash-attn", "flash-attn-4", "lm-eval", "wandb"),
)
LOW_DISK = 10 * 2**30
SETUP = how_to_set_up()

Report = dict[str, Any]


def run_doctor(words: Sequence[str]) -> Report:
    """The command: `doctor [--json FILE]`; returns what it shows."""
    file, rest = take(list(words), "--json")
    if rest:
        raise UserError(f"doctor takes --json FILE alone, got {rest[0]!r}")
    report = collect()
    if file is not None:
        try:
            Path(file).write_text(json.dumps(report, indent=2, default=str) + "\n")
        except OSError as error:
            raise UserError(f"--json {file}: {error.strerror}: name a file that can be written") from None
    print(render(report))
    return report


def collect() -> Report:
    """Everything `render` shows, ready for JSON: one mapping per section, and a list of warnings."""
    machine = Machine(os.environ)
    report: Report = {
        "python": {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix},
        "machine": _machine(machine),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _torch(),
        "gpus": _gpus(),
        "tools": _tools(),
    }
    warnings: list[str] = []
    report["deepspeed"] = _deepspeed(machine, warnings)
    device = "cuda" if report["deepspeed"]["accelerator"] == "cuda" else "cpu"
    report["attention"] = _attention(device)
    report["kernels"] = _kernels(device)
    report["warnings"] = warnings + list(_warnings(report, machine))
    return report


def render(report: Mapping[str, Any]) -> str:
    """A table for a person."""
    machine, torch, deepspeed = report["machine"], report["torch"], report["deepspeed"]
    rows: list[tuple[str, str]] = [
        ("python", f"{report['python']['version']}  ({report['python']['executable']})"),
        ("platform", machine["platform"]),
        ("cpu", f"{machine['cpu'] or 'unknown'}, {machine['cores']} cores"),
        ("memory", f"{_gib(machine['memory'])}, {_gib(machine['memory_free'])} free"),
        ("disk", f"{_gib(machine['disk_free'])} free here"),
        ("", ""),
    ]
    for index, gpu in enumerate(report["gpus"]):
        rows.append((f"gpu {index}", f"{gpu['name']}, {_gib(gpu['memory'])}, compute capability {gpu['capability']}"))
    rows += [
        *([] if report["gpus"] else [("gpu", "none that torch can use")]),
        ("driver", machine["driver"] or "none"),
        ("torch build", f"CUDA {torch['cuda']}, NCCL {torch['nccl'] or 'not in use'}" if torch["cuda"] else "CPU"),
        ("deepspeed", f"accelerator {deepspeed['accelerator']}, backend {deepspeed['backend']}"),
        ("", ""),
    ]
    attention, kernels = report["attention"], report["kernels"]
    rows += [(f"attention: {name}", state) for name, state in attention["backends"].items()]
    rows += [(f"  auto, {kind}", name) for kind, name in attention["auto"].items()]
    rows += [(f"kernels: {kind}", library["state"]) for kind, library in kernels["libraries"].items()]
    rows += list(_checks(kernels["checks"]))
    rows.append(("  auto, miras_scan", kernels["miras_scan"][0] if kernels["miras_scan"] else "does not run"))
    rows.append(("", ""))
    rows += [(name, state or "none") for name, state in report["tools"].items()]
    rows.append(("", ""))
    rows += [(name, version or "-") for name, version in report["packages"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
    lines += ["", *(f"warning: {warning}" for warning in report["warnings"])]
    return "\n".join(lines).rstrip()


def _machine(machine: Machine) -> Report:
    memory = memory_free = None
    with contextlib.suppress(Exception):
        import psutil

        memory, memory_free = psutil.virtual_memory().total, psutil.virtual_memory().available
    disk_free = None
    with contextlib.suppress(OSError):
        disk_free = shutil.disk_usage(Path.cwd()).free
    driver = None
    with contextlib.suppress(OSError):
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        driver = f"NVIDIA {match[0]}" if match else None
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": machine.cores(),
        "memory": memory,
        "memory_free": memory_free,
        "disk_free": disk_free,
        "driver": driver,
    }


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Report:
    """What torch was built with; `error` when it does not load."""
    try:
        import torch

        nccl = None
        if torch.cuda.is_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {"cuda": torch.version.cuda, "nccl": nccl, "error": None}
    except Exception as error:  # a broken install fails in many ways, and the report must come anyway
        return {"cuda": None, "nccl": None, "error": f"{type(error).__name__}: {error}"}


def _gpus() -> list[Report]:
    found = []
    with contextlib.suppress(Exception):
        import torch

        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            device = torch.cuda.get_device_properties(index)
            capability = f"{device.major}.{device.minor}"
            found.append({"name": device.name, "memory": device.total_memory, "capability": capability})
    return found


def _tools() -> dict[str, str | None]:
    """The first line of every tool's `--version`."""
    commands = {"c++ compiler": os.environ.get("CXX") or "c++", "nvcc": _nvcc(), "ninja": "ninja", "pdsh": "pdsh"}
    return {name: _first_line(command, "-V" if name == "pdsh" else "--version") for name, command in commands.items()}


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(home) / "bin" / "nvcc") if home else "nvcc"


def _first_line(command: str, flag: str) -> str | None:
    # ninja is installed next to Python, which need not be on the PATH.
    path = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if path is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
        lines = [line for line in answer.stdout.splitlines() if line.strip()]
        # nvcc says its release in a later line.
        release = [line for line in lines if "release" in line]
        return (release or lines or [path])[0].strip()
    return path


def _deepspeed(machine: Machine, warnings: list[str]) -> Report:
    accelerator = "cpu"
    try:
        accelerator = "cuda" if machine.gpus() else "cpu"
    except UserError as error:
        warnings.append(str(error))
    return {
        "accelerator": accelerator,
        "backend": "nccl" if accelerator == "cuda" else "gloo",
    }


def _attention(device: str) -> Report:
    """Which attention backends load, and which one `auto` takes for bfloat16 heads of 128 (float32 on a CPU)."""
    try:
        import torch

        from pipeline.ops.attention import choose_attention
        from pipeline.ops.attention_flash import MODULES, varlen_function
    except Exception as error:
        return {"backends": {"sdpa": f"torch does not load ({type(error).__name__})"}, "auto": {}}
    backends = {"sdpa": "yes"}
    try:
        importlib.import_module("torch.nn.attention.flex_attention")
        backends["flex"] = "yes" if device == "cuda" else "yes (needs a GPU for the backward pass)"
    except Exception as error:
        backends["flex"] = f"no ({error})"
    for name in sorted(MODULES):
        backends[name] = "yes" if varlen_function(name) is not None else "not installed"
    auto = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for kind, sinks in (("full", 0), ("window", 4)):
        try:
            auto[kind] = choose_attention("full" if kind == "full" else "window", sinks, device, dtype, 128)
        except ValueError as error:
            auto[kind] = str(error)
    return {"backends": backends, "auto": auto}


def _kernels(device: str) -> Report:
    """The native libraries, the checks of their kernels on every device here, and what set-up said when it built them.

    ``miras_scan`` holds the backends that run here, in the order `auto` prefers; ``lost``, by GPU, why nothing runs
    there any more.
    """
    built = _build_report()
    libraries: dict[str, Report] = {kind: _library(kind, built) for kind in ("cpu", "cuda")}
    report: Report = {
        "libraries": libraries,
        "checks": [],
        "lost": {},
        "miras_scan": [],
        "warning": built.get("warning"),
    }
    try:
        import torch

        from pipeline.ops import affine_scan_native, miras_scan, native, scan_native
    except Exception as error:
        for library in libraries.values():
            library["state"] = f"not loaded: torch does not load ({type(error).__name__})"
        return report

    for kind in native.KINDS:
        reason = native.why_not(kind)
        libraries[kind]["loaded"] = reason is None
        libraries[kind]["state"] = _library_state(libraries[kind], reason)
        devices = ["cpu"] if kind == "cpu" else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        for where in devices if reason is None else []:
            try:
                for dtype in scan_native.DTYPES:
                    for key_dim in scan_native.KEY_DIMS:
                        scan_native.why_not(where, dtype, key_dim)
                    affine_scan_native.why_not(where, dtype, dtype)
            except (DeviceLostError, RuntimeError) as error:  # no other check can run there
                report["lost"][where] = str(error).partition("\n")[0]
    report["checks"] = [verdict._asdict() for verdict in native.verdicts()]
    for backend in ("cuda", "cpu", "torch"):
        where = "cpu" if backend == "cpu" else device
        if where == "cuda" and f"cuda:{torch.cuda.current_device()}" in report["lost"]:
            continue
        # A backend that is not built, or not for this device, refuses.
        with contextlib.suppress(Exception):
            vector = torch.ones(1, 2, 1, 32, device=where)
            gate = torch.full((1, 2, 1), 0.5, device=where)
            miras_scan(vector, vector, vector, gate, gate, gate, backend=backend)
            report["miras_scan"].append(backend)
    return report


# `pipeline.ops.native` has the like, but it imports torch, and this is asked for where torch does not load.
def _build_report() -> Report:
    """What setup.py wrote."""
    with contextlib.suppress(OSError, ValueError):
        report = json.loads((PACKAGE / "_native_build.json").read_text())
        if isinstance(report, dict):
            return report
    return {}


def _library(kind: str, built: Report) -> Report:
    files = sorted(path.name for path in PACKAGE.glob(f"_native_{kind}*.so"))
    facts = built.get("libraries", {}).get(kind, {})
    return {
        "file": files[0] if files else None,
        "compiler": facts.get("compiler"),
        "architectures": facts.get("architectures"),
        "loaded": False,
        "state": "not built",
    }


def _library_state(library: Report, reason: str | None) -> str:
    """A library in words; ``reason`` is why it is not loaded."""
    words = [f"for {', '.join(library['architectures'])}"] if library["architectures"] else []
    words += [f"by {library['compiler']}"] if library["compiler"] else []
    how = " ".join(["built", *words])
    if reason is None:
        return how
    if library["file"] is None:
        return reason.removeprefix("it is ")
    # Kernels for a GPU are built where there is none, too.
    return f"{how}; not yet run on a device: {reason}" if library["architectures"] else f"{how}; not loaded: {reason}"


def _checks(checks: list[Report]) -> Iterator[tuple[str, str]]:
    """An op and device, in which cases it runs natively there, and why not in others."""
    for op, device in dict.fromkeys((check["op"], check["device"]) for check in checks):
        cases = [check for check in checks if (check["op"], check["device"]) == (op, device)]
        passed = [check for check in cases if not check["failure"]]
        states = [f"failed: {check['case']}: {check['failure']}" for check in cases if check["failure"]]
        if passed:
            which = f" ({'; '.join(check['case'] for check in passed)})" if states else ""
            largest = max(check["error"] for check in passed)
            states.insert(0, f"checked, largest error {largest:.1e} in {len(passed)} cases{which}")
        for index, state in enumerate(states):
            yield "" if index else f"  {op}, {device}", state


def _warnings(report: Mapping[str, Any], machine: Machine) -> Iterator[str]:
    if report["torch"]["error"]:
        yield f"torch does not load ({report['torch']['error'].splitlines()[0]}): {SETUP}"
    if not report["gpus"] and machine.idle_gpus():
        yield (
            "there are NVIDIA GPUs, but torch cannot use them: install a torch built for this driver"
            " (https://pytorch.org/get-started/locally), then " + SETUP
        )
    yield from _kernel_warnings(report)
    if report["tools"]["ninja"] is None:
        yield f"no ninja, which native builds need: {SETUP}"
    if not report["kernels"]["miras_scan"]:
        yield f"miras_scan runs on no backend here: {SETUP}"
    disk = report["machine"]["disk_free"]
    if disk is not None and disk < LOW_DISK:
        yield f"{_gib(disk)} of disk left here: name a roomier --output-dir"
    yield from _unmet_requirements()


def _kernel_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    kernels = report["kernels"]
    cpu, cuda = kernels["libraries"]["cpu"], kernels["libraries"]["cuda"]
    if kernels["warning"]:
        yield kernels["warning"]
    elif report["tools"]["c++ compiler"] is None and cpu["file"] is None:
        yield f"no C++ compiler, so nothing native is built: install g++ or clang++, then {SETUP}"
    elif cpu["file"] is None:
        yield f"no native kernels are built, and miras_scan is slow without: {SETUP}"
    elif report["gpus"] and cuda["file"] is None:
        yield f"no native kernels are built for the GPU: install the CUDA toolkit (nvcc), then {SETUP}"
    for kind, library in kernels["libraries"].items():
        if library["file"] and not library["loaded"] and (kind == "cpu" or report["gpus"]):
            yield f"the native kernels for the {kind} do not run: {library['state']}"
    yield from kernels["lost"].values()
    for check in kernels["checks"]:
        if check["failure"] and not check["lost"]:
            yield f"{check['op']} is not native on {check['device']} ({check['case']}): {check['failure']}"


def _unmet_requirements() -> Iterator[str]:
    try:
        from packaging.requirements import Requirement

        stated = importlib.metadata.requires("mnemos") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        yield f"the package is not installed in this environment: {SETUP}"
        return
    for line in stated:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield f"{requirement.name} is missing: {SETUP}"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is not {requirement.specifier}: {SETUP}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
