"""A plan is exact where it can be, and says so where it cannot."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import plan as planning
from pipeline.cli import main
from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.flags import split_flags
from pipeline.plan import Plan, PlanOptions, make_plan, render
from pipeline.recipes.miras import miras_32k, miras_64k, miras_128k, miras_tiny

WIDTH, FFN, LAYERS, VOCABULARY = 2048, 8192, 16, 100_352
BACKBONE = 1_484_916_736


def memory_parameters(width: int, layers: int, heads: int, dim: int, conv: int, persistent: int, rank: int) -> int:
    inner = heads * dim
    projections = 4 * width * inner
    gates = 2 * (width * heads + heads) + heads
    convolution = 3 * inner * conv
    norms = width + inner
    output_gate = width * rank + rank * inner + inner
    return layers * (projections + gates + convolution + norms + 2 * persistent * inner + output_gate)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(miras_64k(), PlanOptions(ranks=4, device="B300"))


def test_the_backbone_is_olmo2_1b() -> None:
    attention = 4 * WIDTH * WIDTH + 2 * WIDTH
    block = attention + 3 * WIDTH * FFN + 2 * WIDTH
    assert 2 * VOCABULARY * WIDTH + LAYERS * block + WIDTH == BACKBONE


def test_parameters_are_counted_exactly(plan: Plan) -> None:
    memory = memory_parameters(WIDTH, layers=4, heads=16, dim=128, conv=4, persistent=16, rank=64)
    assert plan.parameters == BACKBONE + memory
    assert plan.trainable == memory


def test_a_trainable_backbone_is_trained() -> None:
    config = miras_tiny()
    plan = make_plan(config, PlanOptions(ranks=2))
    width, ffn = 128, 512
    backbone = 2 * 260 * width + 4 * (4 * width * width + 2 * width + 3 * width * ffn + 2 * width) + width
    memory = memory_parameters(width, layers=2, heads=4, dim=32, conv=4, persistent=4, rank=16)
    assert plan.parameters == plan.trainable == backbone + memory


def test_the_delta_rule_has_no_momentum_to_learn() -> None:
    config = miras_tiny()
    delta = dataclasses.replace(
        config, model=dataclasses.replace(config.model, memory=dataclasses.replace(config.model.memory, rule="delta"))
    )
    options = PlanOptions(ranks=2)
    assert make_plan(config, options).parameters - make_plan(delta, options).parameters == 2 * 4


@pytest.mark.parametrize(
    "zero, weights, gradients, optimizer",
    [("zero0", 1, 1, 1), ("zero1", 1, 1, 8), ("zero2", 1, 8, 8), ("zero3", 8, 8, 8)],
)
def test_each_zero_stage_shards_what_it_should(zero: str, weights: int, gradients: int, optimizer: int) -> None:
    plan = make_plan(replace(miras_64k(), zero=zero), PlanOptions(ranks=8))
    assert plan.weights == 2 * plan.parameters // weights
    assert plan.gradients == 4 * plan.trainable // gradients
    assert plan.optimizer == 12 * plan.trainable // optimizer
    assert plan.memory == plan.weights + plan.gradients + plan.optimizer + plan.activations


def test_offload_leaves_the_device() -> None:
    plan = make_plan(replace(miras_64k(), zero="zero3_offload"), PlanOptions(ranks=8))
    assert (plan.weights, plan.optimizer) == (0, 0)
    assert plan.activations > 0


def test_full_precision_takes_twice_the_weights() -> None:
    options = PlanOptions(ranks=2)
    half, full = (make_plan(replace(miras_tiny(), precision=name), options) for name in ("bf16", "fp32"))
    assert full.weights == 2 * half.weights
    assert full.activations > half.activations


def test_activations_follow_what_a_rank_holds() -> None:
    def activations(config: RunConfig, ranks: int = 4) -> int:
        return make_plan(config, PlanOptions(ranks=ranks)).activations

    whole = activations(miras_64k())
    # But for the working set of a span, which is there once.
    assert activations(replace(miras_64k(), batch_size=4)) == pytest.approx(whole / 2, rel=0.05)
    assert activations(replace(miras_64k(), parallel__sequence=4)) == pytest.approx(whole / 4, rel=0.1)
    assert activations(replace(miras_64k(), activation_checkpointing=False)) > whole
    # Every micro-batch has streams of its own, and what they carry.
    assert whole < activations(replace(miras_64k(), grad_accum=8)) < 1.5 * whole


@pytest.mark.parametrize("recipe", [miras_32k, miras_64k, miras_128k])
def test_hours_follow_from_tokens_and_flops(recipe) -> None:
    config = recipe()
    plan = make_plan(config, PlanOptions(ranks=4, device="B300", utilisation=0.5))
    assert plan.tokens_per_step == 2_097_152
    assert plan.tok_s == pytest.approx(0.5 * 4 * 2250e12 / plan.flops_per_token)
    assert plan.hours == pytest.approx(50_000 * 2_097_152 / plan.tok_s / 3600)


def test_sequence_ranks_share_their_tokens() -> None:
    alone, shared = (
        make_plan(replace(miras_64k(), parallel__sequence=degree), PlanOptions(ranks=8)) for degree in (1, 8)
    )
    assert alone.tokens_per_step == 8 * shared.tokens_per_step
    assert alone.tok_s == shared.tok_s


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"--device Abacus: its peak is not known; known: .*H200"):
        make_plan(miras_tiny(), PlanOptions(ranks=2, device="Abacus"))


def test_ranks_that_cannot_be_laid_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"--parallel\.sequence 2 does not divide the 3 ranks"):
        make_plan(miras_tiny(), PlanOptions(ranks=3))
    with pytest.raises(UserError, match=r"--parallel\.sequence 3 does not divide"):
        make_plan(replace(miras_64k(), sequence_length=65_535, parallel__sequence=3), PlanOptions(ranks=3))


@pytest.mark.parametrize("gib, fits", [(2 * 1024, False), (1, True)])
def test_a_plan_that_does_not_fit_says_so(plan: Plan, gib: int, fits: bool) -> None:
    options = PlanOptions(ranks=4, device="H200")
    text = render(miras_64k(), options, dataclasses.replace(plan, activations=gib * 2**30))
    assert ("does not fit: H200" in text.splitlines()[-1]) is not fits


def test_every_device_that_can_be_planned_for_has_a_known_memory() -> None:
    assert set(planning.MEMORY_GIB) <= set(planning.PEAK_TFLOPS)
    assert {"H100", "H200", "B200", "B300"} <= set(planning.MEMORY_GIB)


def test_the_table_shows_exact_counts(plan: Plan) -> None:
    text = render(miras_64k(), PlanOptions(ranks=4, device="B300"), plan)
    assert "4 x B300" in text and "zero2" in text
    assert f"{plan.parameters:,}" in text and f"{plan.trainable:,} (4.4%)" in text
    assert "2,097,152" in text and "104,857,600,000" in text
    assert "40% of the peak" in text and "(estimate)" in text


def test_flags_of_the_plan_and_of_the_recipe_are_told_apart() -> None:
    words = "miras_64k --ranks 8 --bs 2 --device=B300 --data.path a b --utilisation 0.5 --config x".split()
    own, rest = split_flags(words, ("ranks", "device", "utilisation"))
    assert own == ["--ranks", "8", "--device=B300", "--utilisation", "0.5"]
    assert rest == ["miras_64k", "--bs", "2", "--data.path", "a", "b", "--config", "x"]


def test_the_command_counts_ranks_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan miras_tiny --ranks 4 --bs 2 --device B200".split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("miras_tiny on 4 x B200, zero3, sequence 2")
    assert f"{2 * 2 * 1024:,}" in out


def test_a_plan_needs_no_network_and_no_gpu(tmp_path: Path) -> None:
    """Also with nothing of the hub on disk, and any connection an error."""
    script = """
import socket, sys
def refuse(*arguments, **options): raise RuntimeError("a plan went to the network")
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
from pipeline.cli import main
sys.exit(main(["plan", "miras_64k"]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    root = Path(planning.__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    memory = memory_parameters(WIDTH, layers=4, heads=16, dim=128, conv=4, persistent=16, rank=64)
    assert f"{BACKBONE + memory:,}" in answer.stdout
    assert answer.stderr == ""
