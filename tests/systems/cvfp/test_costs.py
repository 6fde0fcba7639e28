"""What a rank holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.systems.cvfp.costs import activation_bytes
from tests.systems.cvfp.harness import small


@pytest.mark.parametrize(("ranks", "documents"), [(1, 26), (2, 13), (4, 7)])
def test_a_rank_holds_contexts_of_its_own_documents(tmp_path: Path, ranks: int, documents: int) -> None:
    config = small(tmp_path)
    found = activation_bytes(config.model, config, 26, 4, ranks)  # type: ignore[arg-type]
    assert found["contexts"] == 4 * 8 * 12 * documents
