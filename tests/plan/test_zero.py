"""What ZeRO shards, and the buffers that it makes, from the configurations of ds_configs."""

from __future__ import annotations

import pytest

from pipeline.config import replace
from pipeline.ds_config import deepspeed_config
from pipeline.plan.zero import Counts, zero_bytes
from pipeline.recipes.miras import miras_64k

COUNTS = Counts(parameters=1_553_721_536, trainable=68_804_800, largest=205_520_896)
BUCKET = 50_000_000


def held(zero: str, ranks: int = 8, element: int = 2) -> dict[str, int]:
    return zero_bytes(deepspeed_config(replace(miras_64k(), zero=zero)), COUNTS, ranks=ranks, element=element)


@pytest.mark.parametrize(
    "zero, weights, gradients, optimizer",
    [("zero0", 1, 1, 1), ("zero1", 1, 1, 8), ("zero2", 1, 8, 8), ("zero3", 8, 8, 8)],
)
def test_each_stage_shards_what_it_should(zero: str, weights: int, gradients: int, optimizer: int) -> None:
    found = held(zero)
    assert found["weights"] == 2 * COUNTS.parameters // weights
    assert found["gradients"] == 4 * COUNTS.trainable // gradients
    assert found["optimizer"] == 12 * COUNTS.trainable // optimizer


@pytest.mark.parametrize("zero, share", [("zero0", 1), ("zero1", 8), ("zero3", 8), ("zero3_offload", 0)])
def test_an_average_lies_beside_the_master_weights(zero: str, share: int) -> None:
    ds_config = deepspeed_config(replace(miras_64k(), zero=zero))
    found = zero_bytes(ds_config, COUNTS, ranks=8, element=2, averaged=True)
    assert found["average"] == (4 * COUNTS.trainable // share if share else 0)
    assert "average" not in held(zero)


def test_offload_leaves_the_device() -> None:
    found = held("zero3_offload")
    assert (found["weights"], found["gradients"], found["optimizer"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "zero, elements",
    [
        ("zero0", 0),
        ("zero1", 2 * BUCKET),
        ("zero2", 2 * BUCKET),
        # As many weights as may be live, and the one in use; the whole model is not much more.
        ("zero3", BUCKET + 1_000_000_000 + 205_520_896),
        ("zero3_offload", BUCKET + 200_000_000 + 205_520_896),
    ],
)
def test_buffers_are_those_of_the_configuration(zero: str, elements: int) -> None:
    assert held(zero)["ZeRO's buffers"] == 2 * elements
    assert held(zero, element=4)["ZeRO's buffers"] == 4 * elements


def test_no_more_is_gathered_than_there_is() -> None:
    small = Counts(parameters=1_000_000, trainable=1_000_000, largest=300_000)
    found = zero_bytes({"zero_optimization": {"stage": 3, "contiguous_gradients": False}}, small, ranks=2, element=2)
    assert found["ZeRO's buffers"] == 2 * 1_000_000


def test_what_a_configuration_leaves_out_is_as_deepspeed_has_it() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pipeline.plan.zero import DEFAULTS

    known = DeepSpeedZeroConfig()
    assert {
        "contiguous_gradients": known.contiguous_gradients,
        "reduce_bucket_size": known.reduce_bucket_size,
        "stage3_max_live_parameters": known.max_live_parameters,
    } == DEFAULTS
    for value in ({}, {"reduce_bucket_size": "auto"}):
        found = zero_bytes({"zero_optimization": {"stage": 1, **value}}, COUNTS, ranks=1, element=2)
        assert found["ZeRO's buffers"] == 2 * 500_000_000
