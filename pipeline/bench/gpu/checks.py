"""Checks of the figures of a `make gpu` step whose process ended with 0: why the step has not passed, or None."""

from __future__ import annotations

from pipeline.bench.gpu.step import Figures


def all_passed(figures: Figures) -> str | None:
    """At least one test ran, and only tests whose package is not installed were skipped."""
    if not figures.get("passed"):
        return "no test ran"
    unexplained = [reason for reason in figures["reasons"] if "not installed" not in reason]
    return f"tests were skipped: {unexplained[0]}" if unexplained else None


def kernels_checked(figures: Figures) -> str | None:
    """The native library is loaded and all its kernels passed: `doctor` itself never fails."""
    library = figures["kernels"]["libraries"]["cuda"]
    if not library["loaded"]:
        return f"the library for the GPU does not load: {library['state']}"
    failed = [check for check in figures["kernels"]["checks"] if check["failure"]]
    return f"{failed[0]['op']} ({failed[0]['case']}): {failed[0]['failure']}" if failed else None


def has_both_passes(figures: Figures) -> str | None:
    """Both passes were measured: `bench kernels` leaves out what cannot run, with a note."""
    if {row["pass"] for row in figures["rows"]} == {"forward", "forward+backward"}:
        return None
    return "; ".join(figures["notes"]) or "nothing was measured"


def flex_passed(figures: Figures) -> str | None:
    """A case of FlexAttention passed, which is in every torch for CUDA; other backends may not be installed."""
    return None if any("flex" in name for name in figures["names"]) else "no case of FlexAttention passed"
