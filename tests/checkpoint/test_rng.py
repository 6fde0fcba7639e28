"""Random states of a rank."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.rng import rng_state, set_rng_state


def test_random_states_pass_through_a_file_that_holds_no_code(tmp_path: Path) -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    # Away from a fresh seed, with half a pair of normal numbers kept back.
    random.gauss(0, 1)
    np.random.randn()
    torch.randn(3)
    torch.save(rng_state(), tmp_path / "rng.pt")

    def numbers() -> list[float]:
        drawn = [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand()]
        return [*drawn, *torch.randn(3).tolist(), *torch.rand(3).tolist()]

    expected = numbers()
    assert numbers() != expected
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert numbers() == expected
