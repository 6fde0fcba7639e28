"""The report as a table for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def render(report: Mapping[str, Any]) -> str:
    """A table for a person."""
    machine, torch, deepspeed = report["machine"], report["torch"], report["deepspeed"]
    rows: list[tuple[str, str]] = [
        ("python", f"{report['python']['version']}  ({report['python']['executable']})"),
        ("platform", machine["platform"]),
        ("cpu", f"{machine['cpu'] or 'unknown'}, {machine['cores']} cores{', AMX' if machine['amx'] else ''}"),
        ("memory", f"{gib(machine['memory'])}, {gib(machine['memory_free'])} free"),
        ("disk", f"{gib(machine['disk_free'])} free here"),
        ("", ""),
    ]
    for index, gpu in enumerate(report["gpus"]):
        peak = "peak unknown" if gpu["tflops"] is None else f"peak {gpu['tflops']:g} TFLOP/s"
        facts = f"{gpu['name']}, {gib(gpu['memory'])}, compute capability {gpu['capability']}"
        rows.append((f"gpu {index}", f"{facts}, trains in {gpu['precision']}, {peak}"))
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


def _checks(checks: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
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


def gib(size: int | None) -> str:
    """Bytes in GiB, as text."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
