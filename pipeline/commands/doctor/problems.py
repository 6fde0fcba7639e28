"""What is wrong or missing here, and what to do about each: the warnings of a report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.commands.doctor.host import installed_version
from pipeline.commands.doctor.table import gib
from pipeline.host.local import LocalHost
from pipeline.host.package import how_to_set_up

LOW_DISK = 10 * 2**30
SETUP = how_to_set_up()


def warnings_of(report: Mapping[str, Any], machine: LocalHost) -> Iterator[str]:
    """A line for each, which says what to do."""
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
        yield f"{gib(disk)} of disk left here: name a roomier --output-dir"
    yield from unmet_requirements()


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


def unmet_requirements() -> Iterator[str]:
    """A line for each requirement of the installed package that the environment does not meet."""
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
        version = installed_version(requirement.name)
        if version is None:
            yield f"{requirement.name} is missing: {SETUP}"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is not {requirement.specifier}: {SETUP}"
