"""A plan is exact where it can be, and an estimate where it says so."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.host.devices import DEVICES
from pipeline.plan import Plan, PlanOptions, make_plan
from pipeline.recipes.miras import miras_32k, miras_64k, miras_128k, miras_tiny
from tests.plan.sizes import BACKBONE, FFN, LAYERS, VOCABULARY, WIDTH, memory_parameters

GIB = 2**30


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(miras_64k(), PlanOptions(ranks=4, device="B300"))


def test_the_backbone_is_olmo2_1b() -> None:
    attention = 4 * WIDTH * WIDTH + 2 * WIDTH
    block = attention + 3 * WIDTH * FFN + 2 * WIDTH
    assert 2 * VOCABULARY * WIDTH + LAYERS * block + WIDTH == BACKBONE


def test_parameters_are_counted_exactly(plan: Plan) -> None:
    memory = memory_parameters(WIDTH, layers=4, heads=16, dim=128, conv=4, persistent=16, rank=64)
    assert plan.counts.parameters == BACKBONE + memory
    assert plan.counts.trainable == memory
    assert plan.counts.largest == VOCABULARY * WIDTH


def test_a_trainable_backbone_is_trained() -> None:
    counts = make_plan(miras_tiny(), PlanOptions(ranks=2)).counts
    width, ffn = 128, 512
    backbone = 2 * 260 * width + 4 * (4 * width * width + 2 * width + 3 * width * ffn + 2 * width) + width
    memory = memory_parameters(width, layers=2, heads=4, dim=32, conv=4, persistent=4, rank=16)
    assert counts.parameters == counts.trainable == backbone + memory


def test_the_delta_rule_has_no_momentum_to_learn() -> None:
    config = miras_tiny()
    delta = dataclasses.replace(
        config, model=dataclasses.replace(config.model, memory=dataclasses.replace(config.model.memory, rule="delta"))
    )
    counts = [make_plan(changed, PlanOptions(ranks=2)).counts for changed in (config, delta)]
    assert counts[0].parameters - counts[1].parameters == 2 * 4


def test_full_precision_takes_twice_the_weights() -> None:
    options = PlanOptions(ranks=2)
    half, full = (make_plan(replace(miras_tiny(), precision=name), options) for name in ("bf16", "fp32"))
    assert full.held["weights"] == 2 * half.held["weights"]
    assert full.held["working set"] > half.held["working set"]


@pytest.mark.parametrize("recipe", [miras_32k, miras_64k, miras_128k])
def test_hours_follow_from_tokens_and_flops(recipe, plan: Plan) -> None:
    config = recipe()
    found = make_plan(config, PlanOptions(ranks=4, device="B300", utilisation=0.5), plan.counts)
    assert found.tokens_per_step == 2_097_152
    assert found.tok_s == pytest.approx(0.5 * 4 * 2250e12 / found.flops_per_token)
    assert found.hours == pytest.approx(50_000 * 2_097_152 / found.tok_s / 3600)


def test_sequence_ranks_share_their_tokens(plan: Plan) -> None:
    alone, shared = (
        make_plan(replace(miras_64k(), parallel__sequence=degree), PlanOptions(ranks=8), plan.counts)
        for degree in (1, 8)
    )
    assert alone.tokens_per_step == 8 * shared.tokens_per_step
    assert alone.tok_s == shared.tok_s


def test_memory_is_all_that_is_held_and_a_reserve_stays_free(plan: Plan) -> None:
    assert plan.memory == sum(plan.held.values())
    total = 275040 * 2**20
    assert plan.usable_memory == total - plan.reserve and plan.reserve == pytest.approx(2 * GIB + 0.05 * total)
    assert plan.fits
    tight = make_plan(miras_64k(), PlanOptions(ranks=4, device="B300", reserve=total / GIB - 90), plan.counts)
    assert tight.usable_memory == pytest.approx(90 * GIB)
    assert not tight.fits


@pytest.mark.parametrize("device", [device.name for device in DEVICES])
def test_every_device_says_whether_it_fits(device: str, plan: Plan) -> None:
    """miras_64k as it is needs more than the 96 GB of any device and less than the 141 GB of the next."""
    found = make_plan(miras_64k(), PlanOptions(device=device), plan.counts)
    assert found.fits == (found.device.memory > 130 * GIB)


def test_a_device_without_the_kernels_scans_in_pytorch(plan: Plan) -> None:
    """RTX PRO 6000 and H100 NVL have as much memory; a single sequence of 64K is one large scan."""
    config = replace(miras_64k(), batch_size=1)
    native, torch = (make_plan(config, PlanOptions(device=name), plan.counts) for name in ("H100 NVL", "RTX PRO 6000"))
    assert native.held["working set"] < torch.held["working set"]
    forced = make_plan(_in_pytorch(config), PlanOptions(device="H100 NVL"), plan.counts)
    assert forced.held == torch.held


def _in_pytorch(config: RunConfig) -> RunConfig:
    memory = dataclasses.replace(config.model.memory, backend="torch")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


def test_a_device_without_bfloat16_computes_in_float16_which_takes_as_much(plan: Plan) -> None:
    config = replace(miras_64k(), batch_size=1)
    found = {
        precision: make_plan(replace(config, precision=precision), PlanOptions(device="T4"), plan.counts)
        for precision in ("auto", "fp16", "fp32")
    }
    assert found["auto"].held == found["fp16"].held
    # Copies in 2 bytes; masters and moments in float32.
    assert found["fp16"].held["weights"] == 2 * plan.counts.parameters == found["fp32"].held["weights"] / 2
    assert found["fp16"].held["optimizer"] == 12 * plan.counts.trainable == found["fp32"].held["optimizer"]
    assert found["auto"].device.tflops == 65
    with pytest.raises(UserError, match=r"^--precision bf16: T4 has no bfloat16: give fp16, or auto$"):
        make_plan(replace(config, precision="bf16"), PlanOptions(device="T4"), plan.counts)


def test_float16_on_the_kernels_for_float32_keeps_copies(plan: Plan) -> None:
    config = replace(miras_64k(), batch_size=1)
    narrow, half = (
        make_plan(replace(config, precision=precision), PlanOptions(device="H100"), plan.counts)
        for precision in ("bf16", "fp16")
    )
    assert half.held["working set"] > narrow.held["working set"] and half.held["carry"] == narrow.held["carry"]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"--device Abacus: not in the table; known: .*H200"):
        make_plan(miras_tiny(), PlanOptions(ranks=2, device="Abacus"))


def test_a_driver_may_name_the_device(plan: Plan) -> None:
    found = make_plan(miras_64k(), PlanOptions(device="NVIDIA H100 80GB HBM3"), plan.counts)
    assert found.device.name == "H100"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ranks": 0}, r"--ranks is 0"),
        ({"utilisation": 1.5}, r"--utilisation is 1.5"),
        ({"ranks": 2, "reserve": 140.5}, r"--reserve is 140.5: give GiB from 0 to below the 140.4 of the device"),
        ({"ranks": 2, "reserve": -1.0}, r"--reserve is -1"),
        ({"ranks": 3}, r"--parallel\.sequence 2 does not divide the 3 ranks"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(miras_tiny(), PlanOptions(**options))


def test_ranks_that_cannot_be_laid_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"--parallel\.sequence 3 does not divide"):
        make_plan(replace(miras_64k(), sequence_length=65_535, parallel__sequence=3), PlanOptions(ranks=3))
