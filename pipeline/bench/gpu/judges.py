"""Whether a step of `make gpu` whose process ended well has passed, by its figures: why not, or None."""

from __future__ import annotations

from pipeline.bench.gpu.step import Figures


def all_passed(figures: Figures) -> str | None:
    """A test run that passes has run something, and left nothing out but what needs a package that is not there."""
    if not figures.get("passed"):
        return "no test ran"
    unexplained = [reason for reason in figures["reasons"] if "not installed" not in reason]
    return f"tests were skipped: {unexplained[0]}" if unexplained else None


def kernels_checked(figures: Figures) -> str | None:
    """`doctor` never fails; a native kernel that is not used here does."""
    library = figures["kernels"]["libraries"]["cuda"]
    if not library["loaded"]:
        return f"the library for the GPU does not load: {library['state']}"
    failed = [check for check in figures["kernels"]["checks"] if check["failure"]]
    return f"{failed[0]['op']} ({failed[0]['case']}): {failed[0]['failure']}" if failed else None


def has_both_passes(figures: Figures) -> str | None:
    """`bench kernels` leaves out what cannot run, and says why."""
    if {row["pass"] for row in figures["rows"]} == {"forward", "forward+backward"}:
        return None
    return "; ".join(figures["notes"]) or "nothing was measured"


def flex_passed(figures: Figures) -> str | None:
    """FlexAttention is in every torch for CUDA; other backends that are not installed are skipped and counted."""
    return None if any("flex" in name for name in figures["names"]) else "no case of FlexAttention passed"
