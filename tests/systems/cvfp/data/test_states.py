"""Token states of frozen blocks in a file: computed once, of one key, the same for every layout."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.systems.cvfp.data.states import StatesKey, frozen_states, states_path, weights_hash
from pipeline.systems.cvfp.documents import DocumentBatch
from tests.launch.forked import forked
from tests.systems.cvfp.data.numbered import DOCUMENTS, KEY, ONE, check, loader, one_pass


def changed(name: str) -> StatesKey:
    return StatesKey(**{**dataclasses.asdict(KEY), name: "other"})


def never() -> Iterator[tuple[DocumentBatch, Tensor]]:
    pytest.fail("computed again")


def test_states_are_computed_once_and_read_by_any_layout(tmp_path: Path) -> None:
    first = frozen_states(tmp_path, DOCUMENTS, KEY, ONE, lambda: one_pass(loader(ONE)))
    again = frozen_states(tmp_path, DOCUMENTS, KEY, ONE, never)
    for found in (first, again):
        check(found, loader(ONE))
        check(found, loader(ONE, rows=5))
        check(found, loader(ONE, stream=True))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"], "no partial file is left"


def test_another_key_is_another_file(tmp_path: Path) -> None:
    frozen_states(tmp_path, DOCUMENTS, KEY, ONE, lambda: one_pass(loader(ONE)))
    keys = [changed(name) for name in ("weights", "data", "how")]
    assert len({states_path(tmp_path, DOCUMENTS, key) for key in (KEY, *keys)}) == 4


@pytest.mark.parametrize("name", ["weights", "data"])
def test_a_file_of_other_weights_or_data_is_refused(tmp_path: Path, name: str) -> None:
    other = changed(name)
    frozen_states(tmp_path, DOCUMENTS, other, ONE, lambda: one_pass(loader(ONE)))
    for kind in (".npy", ".json"):
        theirs = states_path(tmp_path, DOCUMENTS, other).with_suffix(kind)
        theirs.rename(states_path(tmp_path, DOCUMENTS, KEY).with_suffix(kind))
    with pytest.raises(UserError, match=f"token states of other {name}: remove it and") as caught:
        frozen_states(tmp_path, DOCUMENTS, KEY, ONE, never)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "changed", "no description", "half a description"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    frozen_states(tmp_path, DOCUMENTS, KEY, ONE, lambda: one_pass(loader(ONE)))
    path = states_path(tmp_path, DOCUMENTS, KEY)
    about = path.with_suffix(".json")
    if damage == "no description":
        about.unlink()
    elif damage == "half a description":
        about.write_text(json.dumps({"key": dataclasses.asdict(KEY)}))
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content if damage == "changed" else content[:-9])
    with caplog.at_level(logging.WARNING):
        check(frozen_states(tmp_path, DOCUMENTS, KEY, ONE, lambda: one_pass(loader(ONE))), loader(ONE))
    assert len(caplog.records) == (damage != "no description")
    check(frozen_states(tmp_path, DOCUMENTS, KEY, ONE, never), loader(ONE))


def test_half_a_pass_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"states of \d+ tokens were computed, of \d+"):
        frozen_states(tmp_path, DOCUMENTS, KEY, ONE, lambda: one_pass(loader(ONE), slots=2))
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"--model\.data-cache .*: cannot be written"):
        frozen_states(file, DOCUMENTS, KEY, ONE, never)


def test_ranks_write_one_file(tmp_path: Path) -> None:
    """Two ranks compute, each its own rows, and each reads its own; then one process reads all."""
    done = forked(2, "tests.systems.cvfp.data.states_main", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check(frozen_states(tmp_path, DOCUMENTS, KEY, ONE, never), loader(ONE))


def test_the_hash_of_weights() -> None:
    tensors = {"blocks.0.weight": torch.randn(3, 2), "embedding.weight": torch.randn(2, 3).bfloat16()}
    plain = weights_hash(tensors.items())
    assert weights_hash(reversed(tensors.items())) == plain
    bit = {**tensors, "blocks.0.weight": tensors["blocks.0.weight"].nextafter(torch.tensor(9.0))}
    renamed = {f"{name}x": tensor for name, tensor in tensors.items()}
    shaped = {**tensors, "blocks.0.weight": tensors["blocks.0.weight"].view(2, 3)}
    for other in (bit, renamed, shaped):
        assert weights_hash(other.items()) != plain
    assert (
        weights_hash({**tensors, "blocks.0.weight": tensors["blocks.0.weight"].t().contiguous().t()}.items()) == plain
    )
