"""The predicted times of the CUDA kernels follow from the sources, and are what their README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.bench.kernel_model import INSTRUCTION_FLOPS, KERNELS, KernelEstimate, predict

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "miras_scan" / "cuda"
H200 = {
    "bandwidth": 4.0e12,
    "l2_bandwidth": 5.5e12,
    "tensor_flops": 132 * 1.75e9 * INSTRUCTION_FLOPS,
    "multiprocessors": 132,
    "clock": 1.75e9,
}


def estimates(
    *, tokens: int = 65_536, heads: int = 16, dim: int = 128, dtype: str = "bfloat16", **device: float
) -> dict:
    return predict(1, tokens, heads, dim, dim, dtype, **(H200 | device))


def test_the_table_in_the_readme_is_the_models() -> None:
    text = (SOURCES / "README.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    rows = [row for row in rows if len(row) == 10 and re.fullmatch(r"\d+\.\d", row[1])]
    found = estimates()
    chunks = 1024 * 16

    def cells(several: list[KernelEstimate]) -> list[str]:
        sizes = [sum(x.bytes for x in several), sum(x.l2_bytes for x in several)]
        times = [sum(x.times[need] for x in several) for need in ("memory", "L2", "tensor cores", "latency")]
        times.append(sum(x.seconds for x in several))
        count = sum(x.instructions for x in several) / chunks
        return [*(f"{size / 1e9:.1f}" for size in sizes), f"{count:,.0f}", *(f"{1e3 * time:.2f}" for time in times)]

    expected = [[name, *cells([x]), x.bound] for name, x in found.items()]
    assert rows == [*expected, ["all", *cells(list(found.values())), ""]]
    per_token = sum(x.seconds for x in found.values()) / 65_536
    assert f"{1e6 * per_token:.3f} us per token" in text


@pytest.mark.parametrize("bools", [("false", "true"), ("(bool)0", "(bool)1")], ids=" ".join)
def test_every_kernel_is_found_by_its_name_and_no_other(bools: tuple[str, str]) -> None:
    """As profilers demangle them."""
    kernels = sorted(
        name
        for path in SOURCES.glob("*.cuh")
        for name in re.findall(r"(\w+_kernel)\(\s*const \w+<In> x", path.read_text())
    )
    assert len(kernels) == 6
    hits = []
    for name in kernels:
        for last in (f", {b}" for b in bools) if name == "prepare_kernel" else ("",):
            shown = (
                f"void mnemos::miras_scan::{name}<mnemos::miras_scan::bfloat16, (int)128{last}>"
                "(mnemos::miras_scan::Arguments<mnemos::miras_scan::bfloat16>)"
            )
            (hit,) = (key for key, pattern in KERNELS.items() if re.search(pattern, shown))
            hits.append(hit)
    assert sorted(hits) == sorted(KERNELS)


def test_what_a_kernel_takes_is_the_longest_of_what_it_needs() -> None:
    for x in estimates().values():
        assert x.seconds == max(x.times.values()) == x.times[x.bound]
        assert x.flops == 4096 * x.instructions
    slow = estimates(bandwidth=1e11)
    assert {x.bound for x in slow.values()} == {"memory"}
    assert slow["states"].seconds == slow["states"].bytes / 1e11


def test_work_grows_with_the_tokens_and_time_with_the_waves() -> None:
    short, long, wide = estimates(), estimates(tokens=131_072), estimates(heads=32)
    for name, x in short.items():
        for other in (long[name], wide[name]):
            assert other.bytes == pytest.approx(2 * x.bytes)
            assert other.instructions == pytest.approx(2 * x.instructions)
        assert long[name].seconds == pytest.approx(2 * x.seconds)
    # 128 blocks are one wave over 132 multiprocessors, 256 are two.
    assert wide["states"].latency == 2 * short["states"].latency
    assert estimates(heads=16, multiprocessors=64)["states"].latency == 2 * short["states"].latency


def test_nothing_is_replayed_where_every_state_is_kept() -> None:
    assert "replay" not in estimates(dim=64, dtype="float32")
    assert "replay" in estimates(dim=128, dtype="float32")
