"""The comparison with a plain loop: the same model and rows on both sides, and speeds that are compared in a round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bench.dense import (
    CONTENDERS,
    DDP,
    DEFAULT,
    PLAIN,
    _split,
    compare,
    contenders,
    interval,
    render,
    run_dense,
)
from pipeline.bench.dense_case import check_losses, decay_groups
from pipeline.commands.flags import parse_run
from pipeline.errors import UserError
from pipeline.load import model_without_storage
from tests.launch.harness import single

SMALL = ["olmo_tiny", "--model.backbone.width", "32", "--model.backbone.layers", "2", "--sequence-length", "32",
         "--batch-size", "2"]  # fmt: skip


def test_two_ranks_beside_ddp(tmp_path: Path, bench: Callable) -> None:
    """From the same weights on the same rows: the losses are compared before anything is timed."""
    out = tmp_path / "dense.json"
    done = bench("dense", "--rounds", "2", "--ranks", "2", "--json", str(out), *SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    plain, zero3 = result["rows"]
    assert (plain["name"], zero3["name"]) == (DDP, "zero3 on 2 ranks, fp32")
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["rounds"].values())
    assert plain["tok_s"] == pytest.approx(64 / plain["seconds"]) and plain["speed"] is None
    low, high = zero3["interval"]
    assert 0 < low <= zero3["speed"] <= high and zero3["reached"] == (zero3["speed"] >= 0.75)
    assert result["losses"][DDP] == pytest.approx(result["losses"]["zero3 on 2 ranks, fp32"], rel=1e-4)
    assert result["machine"]["ranks"] == 2 and result["versions"]["torch"]
    assert "goal 0.75" in done.stdout and all(len(line) < 160 for line in done.stdout.splitlines())


@pytest.mark.slow
def test_a_step_is_as_fast_as_in_a_plain_loop(tmp_path: Path, record_property: Any) -> None:
    """Width 512, 8 layers, 4,096 tokens a step, two threads: within 10 % of the plain loop, with ZeRO-3 within 25 % of
    DistributedDataParallel, and with bfloat16 1.6 times as fast as the plain loop in float32."""
    out = tmp_path / "dense.json"
    done = single("pipeline", "bench", "dense", "--json", str(out), timeout=3600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = json.loads(out.read_text())["rows"]
    for row in rows:
        if row["goal"] is not None:
            low, high = row["interval"]
            record_property(f"speed of {row['name']}", f"{row['speed']:.2f} ({low:.2f} to {high:.2f})")
    assert [row["name"] for row in rows if row["reached"] is False] == []


def test_speeds_are_those_of_a_round_and_medians_over_them() -> None:
    rows = compare({PLAIN: [2.0, 4.0, 8.0], "zero0, fp32": [1.0, 4.0, 4.0], "zero0, bf16": [1.0, 2.0, 8.0]}, 64)
    plain, fp32, bf16 = rows
    assert plain["seconds"] == 4.0 and plain["tok_s"] == 16.0
    assert fp32["speed"] == 2.0 and fp32["interval"] == (1.0, 2.0) and fp32["reached"]
    assert bf16["speed"] == 2.0 and bf16["reached"]
    assert not compare({PLAIN: [1.0] * 3, "zero0, fp32": [1.2] * 3}, 64)[1]["reached"]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.5, 2))
def test_an_interval_holds_its_median_and_scales_with_its_values(values: list[float], factor: float) -> None:
    low, high = interval(values)
    assert min(values) <= low <= sorted(values)[len(values) // 2] and low <= high <= max(values)
    assert interval([factor * value for value in values]) == pytest.approx((factor * low, factor * high))


def test_the_table_has_a_line_for_every_contender() -> None:
    rows = compare({contender.name: [1.0, 2.0] for contender in CONTENDERS}, 4096)
    result = {
        "recipe": "x", "parameters": 1000, "tokens_per_step": 4096, "options": {"threads": 2}, "rows": rows,
        "machine": {"device": {"kind": "cpu", "name": "a CPU", "cores": 2}}, "versions": {"torch": "2", "cuda": None},
    }  # fmt: skip
    lines = render(result).splitlines()
    assert len(lines) == 3 + len(CONTENDERS) and all(len(line) <= 120 for line in lines)
    assert "goal 1.60: not reached" in next(line for line in lines if line.startswith("zero0, bf16"))


def test_compiled_blocks_take_part_where_they_are_asked_for() -> None:
    assert not any(contender.compiled for contender in contenders(1, compiled=False))
    assert [c.name for c in contenders(1, compiled=True) if c.compiled] == ["zero0, fp32, compiled"]
    assert _split(["--compile", "--ranks", "1", "2", "olmo_tiny", "--json", "x"]) == (
        ["--compile", "--ranks", "1", "2", "--json", "x"], ["olmo_tiny"],
    )  # fmt: skip


def test_the_default_is_the_size_that_the_goals_are_for() -> None:
    config = parse_run(list(DEFAULT), "bench dense")
    backbone = config.model.backbone  # type: ignore[attr-defined]
    assert (backbone.width, backbone.layers, backbone.ffn) == (512, 8, 2048)
    assert config.batch_size * config.sequence_length * config.grad_accum == 4096


def test_contenders_that_train_other_models_are_not_compared() -> None:
    names = {contender.name: 5.0 for contender in contenders(1, compiled=False)}
    check_losses(names, contenders(1, compiled=False))
    with pytest.raises(UserError, match=r"5\.01000 with zero0, fp32 and 5\.00000 in the plain loop"):
        check_losses(names | {"zero0, fp32": 5.01}, contenders(1, compiled=False))


def test_the_plain_loop_decays_what_the_engine_decays() -> None:
    config = parse_run(SMALL, "bench dense")
    loaded = model_without_storage(config)
    plain = loaded.model.backbone
    decayed, others = decay_groups(plain, loaded.phases[0].groups, config)  # type: ignore[arg-type]
    assert decayed["weight_decay"] == config.weight_decay > 0 == others["weight_decay"]
    assert decayed["lr"] == others["lr"] == config.lr
    # Every one once; a tied head is its embedding.
    assert len(decayed["params"]) + len(others["params"]) == len(list(plain.parameters()))  # type: ignore[union-attr]
    assert all(parameter.dim() == 2 for parameter in decayed["params"])


def test_a_system_that_trains_more_than_a_decoder_is_refused() -> None:
    config = parse_run(["miras_tiny"], "bench dense")
    loaded = model_without_storage(config)
    with pytest.raises(UserError, match=r"miras_tiny trains memory\.\d+\.\S+, which the plain decoder lacks"):
        decay_groups(loaded.model.backbone, loaded.phases[0].groups, config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--rounds 0", "--rounds is 0"), ("--threads 0", "--threads is 0"), ("--ranks 3", "--ranks is 3"),
        ("--data.document-mask", "--data.document-mask: the plain loop sees across documents"),
        ("--model.z-loss 1e-5", "--model.z-loss is 1e-05: the plain loop has none: give 0"),
        ("--grad-accum 2", "--grad-accum is 2"), ("--batch-size 3", "--batch-size is 3"), ("--round 3", "--rounds?"),
    ],
)  # fmt: skip
def test_refusals(words: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)  # before anything is measured
    with pytest.raises(UserError) as caught:
        run_dense(words.split())
    assert part in str(caught.value)
