"""What the engine adds to a step of peptide diffusion (`make accept NAME=mimir_speed`)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.launch.harness import single

ROUNDS = 40


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_step_is_as_fast_as_in_a_plain_loop(tmp_path: Path, record_property: Any) -> None:
    """Preset small, 256 peptides a step, two threads: within 10 % of a plain loop, and no waiting for the loader."""
    main = "tests.systems.mimir.speed_main"
    done = single(main, str(tmp_path), str(ROUNDS), timeout=1200, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    engine, plain = found["seconds"]["engine"], found["seconds"]["plain"]
    assert found["threads"] == 2 and len(engine) == len(plain) == ROUNDS
    # From the same weights on the same peptides, but for the conditions that training withholds.
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=0.02)
    ratio = statistics.median(one / other for one, other in zip(engine, plain, strict=True))
    for name, value in {
        "ms, engine": 1e3 * statistics.median(engine),
        "ms, plain loop": 1e3 * statistics.median(plain),
        "ratio": ratio,
        "share of the time waiting for data": found["data_wait"],
    }.items():
        record_property(name, f"{value:.3g}")
        print(f"{name}: {value:.4g}")
    assert ratio <= 1.1
    assert found["data_wait"] < 0.02
