"""How far attention sees. What it computes is tested with the ops and with the systems' models."""

from __future__ import annotations

from pipeline.lm.attention import window_edges
from pipeline.lm.config import AttentionConfig


def test_full_attention_has_no_edge() -> None:
    assert window_edges(AttentionConfig(kind="full"), 4) == {}
    assert window_edges(AttentionConfig(window=64), 4) == {"window of 64": 64.0, "reach of 4 layers": 252.0}


def test_a_window_of_the_token_itself_reaches_nowhere() -> None:
    assert window_edges(AttentionConfig(window=1), 4) == {"window of 1": 1.0}
