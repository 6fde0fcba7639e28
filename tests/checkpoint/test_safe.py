"""What DeepSpeed keeps in its shards is written as plain values."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pipeline.checkpoint.safe import load_pickle, plain


def test_enumerations_become_their_values_and_the_rest_stays(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    content = {
        "zero_stage": ZeroStageEnum.weights,
        "nested": [(ZeroStageEnum.gradients, "text"), OrderedDict(a=fragment_address(3, 4))],
        "state": defaultdict(dict, {0: {"exp_avg": tensor}}),
    }
    found = plain(content)
    assert type(found["zero_stage"]) is int and found["zero_stage"] == 3
    assert type(found["nested"][0][0]) is int and found["nested"][0] == (2, "text")
    assert type(found["nested"][1]) is OrderedDict and found["nested"][1]["a"].numel == 3
    assert type(found["state"]) is dict and found["state"][0]["exp_avg"] is tensor
    torch.save(found, tmp_path / "shard.pt")
    assert load_pickle(tmp_path / "shard.pt")["zero_stage"] == 3
