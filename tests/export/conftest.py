"""An export whose fresh process is left out: what it computes is tested apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.export.gate import Case, Difference

EQUAL = Difference({"logits": (1e-7, 5.0)}, "AnyForCausalLM")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that a fresh process would have been asked for."""
    asked: list[Case] = []

    def compare(cases: Sequence[Case]) -> list[Difference]:
        asked.extend(cases)
        return [EQUAL for _ in cases]

    monkeypatch.setattr("pipeline.export.write.compare", compare)
    return asked
