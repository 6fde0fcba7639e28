"""Settings that would do nothing are refused."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.systems.cvfp.config import CvfpConfig, PredictionConfig, SolveConfig

IGNORED: dict[str, dict[str, Any]] = {
    "--model.decay 0.3 with --model.as-published": {"as_published": True, "decay": 0.3},
    "--model.initial-std 0.1 with --model.as-published": {"as_published": True, "initial_std": 0.1},
    "--model.train-embedding with --freeze-context": {
        "train_embedding": True, "prediction": PredictionConfig(freeze_context=True),
    },
}  # fmt: skip


@pytest.mark.parametrize("says", IGNORED)
def test_a_setting_that_another_makes_void_is_refused(says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        CvfpConfig(**IGNORED[says])
    assert "\n" not in str(raised.value)
    CvfpConfig(as_published=True)


@pytest.mark.parametrize("carry", ["document", "stream", "circular"])
@pytest.mark.parametrize("way", ["sequential", "jacobi", "newton"])
def test_contexts_go_on_by_any_way(carry: Any, way: Any) -> None:
    assert CvfpConfig(carry=carry, solve=SolveConfig(way)).adjacent == (carry != "document" and way != "sequential")
