"""The mutations that other tests feed to readers."""

from __future__ import annotations

import json

from tests.mutations import MUTATIONS, mutations

VALID = b"".join(json.dumps({"step": step, "loss": 1.5, "tags": ["a", None]}).encode() + b"\n" for step in range(5))


def test_the_same_seed_gives_the_same_mutations() -> None:
    assert list(mutations(VALID, 50, seed=3)) == list(mutations(VALID, 50, seed=3))
    assert list(mutations(VALID, 50, seed=3)) != list(mutations(VALID, 50, seed=4))


def test_every_mutation_is_drawn_and_nearly_all_change_the_content() -> None:
    drawn = list(mutations(VALID, 400, seed=0))
    assert all(any(mutation.__name__ in name for name, _ in drawn) for mutation in MUTATIONS)
    assert sum(content != VALID for _, content in drawn) > 380


def test_an_empty_file_can_be_mutated() -> None:
    assert len(list(mutations(b"", 200, seed=0))) == 200


def test_a_swapped_value_leaves_the_other_lines_whole() -> None:
    for name, content in mutations(VALID, 400, seed=1):
        if name.endswith(": swap_json_value"):
            assert sum(line not in VALID.splitlines() for line in content.splitlines()) <= 1
