"""The loss scale of DeepSpeed's two kinds of scalers: when it changes, and what is kept of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler as theirs

from pipeline.checkpoint.safe import load_pickle
from pipeline.ds_config import FP16
from pipeline.loss_scale import LossScale, scale_state


@pytest.fixture(autouse=True)
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs.dist, "get_rank", lambda: 0)


class Zero:
    """A ZeRO optimizer as far as the scale goes."""

    def __init__(self, window: int = 1000) -> None:
        self.loss_scaler = theirs.CreateLossScaler(
            torch.float16,
            1.0,
            True,
            {
                "init_scale": 2.0 ** FP16["initial_scale_power"],
                "scale_window": window,
                "min_scale": FP16["min_loss_scale"],
                "delayed_shift": FP16["hysteresis"],
                "consecutive_hysteresis": False,
            },
        )

    def _update_scale(self, has_overflow: bool = False) -> None:
        self.loss_scaler.update_scale(has_overflow)

    def step(self, overflow: bool) -> float:
        """The scale that gradients are divided by, which DeepSpeed changes before."""
        self._update_scale(overflow)
        return float(self.loss_scaler.cur_scale)


def test_the_first_overflow_halves_the_scale() -> None:
    scale = LossScale(Zero())
    assert scale.value == 65536
    assert scale.update(overflow=True) and scale.value == 32768
    assert not scale.update(overflow=False) and scale.value == 32768


def test_gradients_are_divided_by_the_scale_that_they_were_multiplied_by() -> None:
    optimizer = Zero(window=1)
    scale = LossScale(optimizer)
    for _ in range(4):
        before = scale.value
        assert optimizer.step(False) == before
        scale.update(overflow=False)
    assert scale.value == 65536 * 8


def test_at_the_least_scale_an_overflow_is_no_longer_answered() -> None:
    optimizer = Zero()
    scale = LossScale(optimizer)
    lowered = [scale.update(overflow=True) for _ in range(20)]
    assert lowered == [True] * 16 + [False] * 4 and scale.value == scale.least == 1
    assert (optimizer.loss_scaler.cur_iter, optimizer.loss_scaler.last_overflow_iter) == (20, 19)


def test_what_a_shard_holds_of_it_is_read_without_running_code(tmp_path: Any) -> None:
    optimizer = Zero()
    LossScale(optimizer).update(overflow=True)
    torch.save({"loss_scaler": optimizer.loss_scaler}, tmp_path / "shard.pt")
    found = load_pickle(tmp_path / "shard.pt")
    assert vars(found["loss_scaler"]) == vars(optimizer.loss_scaler)
    state = scale_state(found)
    assert state == {"cur_scale": 32768, "cur_iter": 1, "last_overflow_iter": 0, "cur_hysteresis": 1}


def test_a_scale_that_does_not_change_is_none() -> None:
    assert scale_state({"loss_scaler": theirs.LossScaler(1.0)}) is None
    assert scale_state({"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": 3}) is None
    assert scale_state({"state": {}, "param_groups": []}) is None


def test_a_state_goes_from_one_kind_of_scaler_to_the_other() -> None:
    zero = LossScale(Zero())
    saved = {"dynamic_loss_scale": True, "cur_scale": 128.0, "cur_iter": 9, "last_overflow_iter": 4, "scale_window": 7}
    zero.load(scale_state(saved) or {})
    assert zero.value == 128 and zero._holder.cur_iter == 9 and zero._holder.scale_window == 1000
    config = theirs.LossScaleConfig(torch.float16, True, 0, {"init_scale": 2, "scale_window": 7, "min_scale": 1})
    plain = LossScale(SimpleNamespace(loss_scale_config=config, _update_scale=None))
    plain.load(scale_state({"loss_scaler": zero._holder}) or {})
    assert (plain.value, config.cur_iter, config.last_overflow_iter, plain.least) == (128, 9, 4, 1)
