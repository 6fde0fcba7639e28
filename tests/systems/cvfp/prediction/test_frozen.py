"""Token states of frozen blocks: computed once, kept in a file by weights and data, and refused where they are not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.system import Carry
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.prediction.frozen import FrozenStates, FrozenWriter
from pipeline.systems.cvfp.prediction.phase import Prediction
from tests.systems.cvfp.prediction.naive import SYNC, batches, context, small


class Counting(nn.Module):
    """Counts the calls that read tokens, and so run the blocks."""

    def __init__(self, module: CvfpModel) -> None:
        super().__init__()
        self.module, self.read = module, 0

    def forward(self, ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.read += ids is not None
        return self.module(ids, *args, **kwargs)


def losses(prediction: Prediction, model: nn.Module, passes: int = 1) -> list[float]:
    carry: Carry = {}
    found = []
    for batch in batches(prediction, passes=passes):
        output = prediction.forward(model, batch, carry, context())
        carry = output.carry
        found.append(output.sums["cross_entropy"].item())
    if prediction.section.freeze_context:
        assert not carry
    return found


def files(folder: Path) -> set[Path]:
    return set((folder / "cache").glob("frozen_*"))


@pytest.mark.parametrize("carry", ["document", "stream"])
def test_blocks_run_once_and_the_losses_are_those_of_the_whole_model(tmp_path: Path, carry: str) -> None:
    prediction, model = small(tmp_path, carry=carry, freeze_context=True)
    counting = Counting(model)
    prediction.begin(counting, SYNC)
    calls = counting.read
    found = losses(prediction, counting, passes=2)
    assert calls > 0 and counting.read == calls and len(files(tmp_path)) == 1
    half = len(found) // 2
    assert found[:half] == found[half:]
    if carry == "document":
        whole, _ = small(tmp_path)
        assert found[:half] == pytest.approx(losses(whole, model), rel=1e-9)


def test_another_run_and_a_resume_read_the_file(tmp_path: Path) -> None:
    prediction, model = small(tmp_path, freeze_context=True)
    prediction.begin(model, SYNC)
    expected = losses(prediction, model)
    for begins in (True, False):
        other, _ = small(tmp_path, freeze_context=True)
        counting = Counting(model)
        if begins:
            other.begin(counting, SYNC)
        assert losses(other, counting) == expected and counting.read == 0
    for path in files(tmp_path):
        path.unlink()
    again, _ = small(tmp_path, freeze_context=True)
    counting = Counting(model)
    assert losses(again, counting) == expected and counting.read > 0 and len(files(tmp_path)) == 1


def test_the_head_does_not_count_and_whatever_decides_a_state_does(tmp_path: Path) -> None:
    prediction, model = small(tmp_path, freeze_context=True)
    prediction.begin(model, SYNC)
    (first,) = files(tmp_path)
    with torch.no_grad():
        model.head.weight += 1
    small(tmp_path, freeze_context=True)[0].begin(model, SYNC)
    assert files(tmp_path) == {first}
    small(tmp_path, freeze_context=True, context="zero")[0].begin(model, SYNC)
    small(tmp_path, freeze_context=True, seed=1)[0].begin(model, SYNC)
    with torch.no_grad():
        model.blocks[1].norm_token.bias[0] += 1e-3
    small(tmp_path, freeze_context=True)[0].begin(model, SYNC)
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["other", "cut", "text"])
def test_a_file_of_other_states_or_a_damaged_one_is_refused(tmp_path: Path, damage: str) -> None:
    prediction, model = small(tmp_path, freeze_context=True)
    prediction.begin(model, SYNC)
    (path,) = files(tmp_path)
    if damage == "other":
        with torch.no_grad():
            model.blocks[0].linear.bias += 1
        small(tmp_path, freeze_context=True)[0].begin(model, SYNC)
        (other,) = files(tmp_path) - {path}
        shutil.copy(path, other)
        path = other
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"text")
    with pytest.raises(UserError, match=r"frozen_skewed_.*: (holds the token states of other|is no file).*: remove it"):
        small(tmp_path, freeze_context=True)[0].begin(model, SYNC)


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    prediction, model = small(tmp_path, freeze_context=True)
    counting = Counting(model)
    with pytest.raises(UserError, match=r"--model\.data-cache"):
        prediction.begin(counting, SYNC)
    assert counting.read == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    prediction, model = small(tmp_path, freeze_context=True)
    prediction.begin(model, SYNC)
    expected = losses(prediction, model)
    dry, _ = small(tmp_path / "dry", freeze_context=True)
    dry.config = dataclasses.replace(dry.config, dry_run=True)
    dry.begin(model, SYNC)
    # A sum over memory that is aligned otherwise may differ in its last bit.
    assert losses(dry, model) == pytest.approx(expected, rel=1e-14)
    assert not (tmp_path / "dry").exists()


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    key = {"weights": "a"}
    writer = FrozenWriter(tmp_path / "states.safetensors", key)
    states = torch.randn(5, 3).bfloat16()
    writer.add(2, 4, states)
    assert writer.write() == states.nbytes
    assert torch.equal(FrozenStates(writer.path, key).states(2, 4), states)
    with pytest.raises(UserError, match="other weights"):
        FrozenStates(writer.path, {"weights": "b"})
