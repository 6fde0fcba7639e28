"""The checks for contexts that are of no use."""

from __future__ import annotations

from pipeline.systems.cvfp.evaluation.checks import is_attractor


def test_one_context_for_all_tokens_is_an_attractor() -> None:
    all_one = {"distance_of_contexts": 0.05, "cosine_of_contexts": 0.999, "norm": 27.0}
    assert is_attractor(all_one) and not is_attractor({**all_one, "distance_of_contexts": 5.0})
    assert not is_attractor({**all_one, "cosine_of_contexts": 0.5})
    assert is_attractor({"distance_of_contexts": 5.0, "cosine_of_contexts": 0.0, "norm": 0.01})
