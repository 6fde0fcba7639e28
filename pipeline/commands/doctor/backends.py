"""Which attention backends and native kernels run here, and what set-up printed when it built them."""

from __future__ import annotations

import contextlib
import importlib
import json
from typing import Any

from pipeline.errors import DeviceLostError
from pipeline.host.package import PACKAGE


def attention_backends(device: str) -> dict[str, Any]:
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


def kernel_facts(device: str) -> dict[str, Any]:
    """The native libraries, the checks of their kernels on every device here, and the output of set-up's build.

    ``miras_scan`` holds the backends that run here, in the order `auto` prefers; ``lost``, by GPU, why nothing runs
    there any more.
    """
    built = _build_report()
    libraries: dict[str, dict[str, Any]] = {kind: _library(kind, built) for kind in ("cpu", "cuda")}
    report: dict[str, Any] = {
        "libraries": libraries,
        "checks": [],
        "lost": {},
        "miras_scan": [],
        "warning": built.get("warning"),
    }
    try:
        import torch

        from pipeline.ops import (
            affine_scan_native,
            attention_slots_native,
            memory_step_native,
            miras_scan,
            native,
            scan_native,
            store_slots_native,
        )
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
                    for key_dim in memory_step_native.KEY_DIMS:
                        memory_step_native.why_not(where, dtype, key_dim)
                    if kind == "cpu":
                        store_slots_native.why_not(dtype)
                        attention_slots_native.why_not(dtype)
            except (DeviceLostError, RuntimeError) as error:  # no other check can run there
                report["lost"][where] = str(error).partition("\n")[0]
    report["checks"] = [check._asdict() for check in native.kernel_checks()]
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
def _build_report() -> dict[str, Any]:
    """What setup.py wrote."""
    with contextlib.suppress(OSError, ValueError):
        report = json.loads((PACKAGE / "_native_build.json").read_text())
        if isinstance(report, dict):
            return report
    return {}


def _library(kind: str, built: dict[str, Any]) -> dict[str, Any]:
    files = sorted(path.name for path in PACKAGE.glob(f"_native_{kind}*.so"))
    facts = built.get("libraries", {}).get(kind, {})
    return {
        "file": files[0] if files else None,
        "compiler": facts.get("compiler"),
        "architectures": facts.get("architectures"),
        "loaded": False,
        "state": "not built",
    }


def _library_state(library: dict[str, Any], reason: str | None) -> str:
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
