"""What the system says to a person is short, and says no more than was measured."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pipeline.recipes.miras import miras_64k, miras_tiny
from pipeline.systems.miras.descriptions import caption, gap_line, headline, health, layers, memory_line

HEALTH = {
    "norm_M": 3.564, "norm_S": 0.0658, "memory/alpha": 0.0001879, "memory/eta": 0.1002, "memory/theta": 0.1429,
    "memory/half_life": 3345.4,
}  # fmt: skip


def test_an_evaluation_is_a_line() -> None:
    scalars = {"loss": 2.2451, "ppl": 9.44, "bpb": 3.239, "memory_off/loss": 2.588, "memory_off/bpb": 3.73, "labels": 9}
    assert headline(scalars) == "val 2.245 | memory off 2.588 (+0.343) | 3.24 bpb"
    assert headline({"loss": 2.0, "memory_off/loss": 1.75}) == "val 2.000 | memory off 1.750 (-0.250)"
    scalars["memory_emptied/loss"] = 2.347
    assert headline(scalars) == "val 2.245 | memory off 2.588 (+0.343), emptied 2.347 (+0.102) | 3.24 bpb"
    assert headline({"loss": 2.0, "bpb": 3.0}) == "val 2.000 | 3.00 bpb"


def test_an_evaluation_of_recall_says_the_share_of_right_answers() -> None:
    scalars = {"loss": 0.045, "recall": 0.989, "memory_off/loss": 2.77, "memory_off/recall": 0.062}
    assert headline(scalars) == "val 0.045 | memory off 2.770 (+2.725) | 98.9 % right, memory off 6.2 %"
    scalars |= {"memory_emptied/loss": 2.5, "memory_emptied/recall": 0.07}
    assert headline(scalars).endswith("(+2.455) | 98.9 % right, memory off 6.2 %, emptied 7.0 %")
    assert headline({"loss": 0.045, "recall": 0.989}) == "val 0.045 | 98.9 % right"


def test_the_gap_is_said_where_it_was_measured() -> None:
    worth = {"gap/worth": 0.01271, "gap/worth_low": 0.0098, "gap/worth_high": 0.0151}
    assert headline({"loss": 2.0, **worth}) == "val 2.000 | remembering worth 0.0127 (0.0098 to 0.0151)"
    closed = {"gap/closed": 0.054, "gap/closed_low": 0.031, "gap/closed_high": 0.079}
    line = "gap closed 5.4 % (3.1 to 7.9), remembering worth 0.0127 (0.0098 to 0.0151)"
    assert headline({"loss": 2.0, **worth, **closed}) == f"val 2.000 | {line}"
    unsure = {**worth, "gap/worth_low": math.nan, **closed, "gap/closed_high": math.nan}
    assert gap_line(unsure) == "gap closed 5.4 %, remembering worth 0.0127"
    more = {f"gap/{key}{end}": 0.25 for key in ("closed_own", "closed_equal") for end in ("", "_low", "_high")}
    ends = "25.0 % (25.0 to 25.0)"
    own = f"by the document's own state {ends}, a window of equal state {ends}, remembering"
    assert own in gap_line({**worth, **closed, **more})
    assert gap_line({**worth, **closed, "gap/closed": math.nan}).startswith("no gap to full attention, remembering")


def test_a_loss_that_is_not_finite_is_said() -> None:
    assert headline({"loss": float("nan"), "memory_off/loss": 2.0}).startswith("val nan | memory off 2.000")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((2,), "layer 2"),
        ((1, 3), "layers 1 and 3"),
        ((1, 2), "layers 1 and 2"),
        ((8, 10, 12, 14), "layers 8, 10, 12 and 14"),
        (tuple(range(30)), "layers 0 to 29"),
        (("upper4",), "layer upper4"),
    ],
)
def test_layers_are_listed(numbers: tuple[int, ...], text: str) -> None:
    assert layers(numbers) == text


def test_the_memory_is_said_in_a_line() -> None:
    memory = miras_tiny().model.memory  # type: ignore[attr-defined]
    assert memory_line([memory], ["cpu"]) == "titans, residual; layers 1 and 3; 4 heads x 32; backend cpu"
    mac = dataclasses.replace(memory, attachment="mac", rule="yaad")
    assert memory_line([mac], ["torch"]).startswith(
        "yaad with gradients by chunks of 16, mac in segments of 64; layers 1"
    )
    both = memory_line(
        [dataclasses.replace(memory, layers=(1,)), dataclasses.replace(memory, layers=(3,))], ["cpu"] * 2
    )
    one = "titans, residual; layer {}; 4 heads x 32; backend cpu"
    assert both == f"{one.format(1)} | {one.format(3)}"
    assert memory_line([], []) == "none"


def test_a_run_is_told_from_another_by_its_window_and_memory() -> None:
    assert caption(miras_tiny().model) == "window 64, titans on layers 1 and 3"  # type: ignore[arg-type]
    assert caption(miras_64k().model) == "window 4096, titans on layers 8, 10, 12 and 14"  # type: ignore[arg-type]


def test_health_is_said_in_words() -> None:
    memory = "|M| 3.56, |S| 0.0658 | forget 0.00019, momentum 0.1, step 0.14 | half-life 3345 tokens"
    assert health(HEALTH) == memory and health({}) == ""
    assert health({**HEALTH, "beyond_window": 0.875}) == f"{memory} | 88 % beyond the window"
    assert health({"beyond_window": 0.0}) == "0 % beyond the window"
