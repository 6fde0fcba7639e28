"""What is on disk is what was meant, and its hash is known without reading it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash

from pipeline.checkpoint.files import BLOCK, Staging, checksum, hash_of, tensor_bytes, write_shard, write_tensors


@pytest.mark.parametrize("numbers", [3, BLOCK // 4 - 1, BLOCK // 4, 3 * BLOCK // 4 + 5])
def test_a_shard_is_what_torch_saves_and_its_entry_is_of_the_file(tmp_path: Path, numbers: int) -> None:
    content = {"a": torch.randn(numbers), "b": [torch.arange(7), "text", 3]}
    entry = write_shard(content, tmp_path / "shard.pt")
    found = torch.load(tmp_path / "shard.pt", weights_only=True)
    assert torch.equal(found["a"], content["a"]) and found["b"][1:] == ["text", 3]
    data = (tmp_path / "shard.pt").read_bytes()
    assert entry == {"size": len(data), "xxh128": xxhash.xxh3_128_hexdigest(data)} == checksum(tmp_path / "shard.pt")


def test_other_files_are_read_back_for_their_hash(tmp_path: Path) -> None:
    entry = write_tensors({"x": torch.arange(3.0)}, tmp_path / "file", {"key": "value"})
    data = (tmp_path / "file").read_bytes()
    assert entry == {"size": len(data), "xxh128": xxhash.xxh3_128_hexdigest(data)} == checksum(tmp_path / "file")
    assert hash_of(tmp_path / "file") == entry["xxh128"]


def state() -> dict[str, object]:
    return {"a": torch.arange(6.0).view(2, 3).t(), "b": [torch.ones(2), (torch.zeros(1), "x")], "c": {"d": {1, 2}}}


def test_staged_tensors_do_not_follow_training() -> None:
    staging, content = Staging(), state()
    copied = staging.copy(content, "file")
    content["a"].add_(1)  # type: ignore[attr-defined]
    content["b"][1][0].add_(1)  # type: ignore[index]
    content["c"]["d"].add(3)  # type: ignore[index]
    expected = state()
    assert torch.equal(copied["a"], expected["a"]) and copied["c"] == expected["c"]
    assert torch.equal(copied["b"][1][0], torch.zeros(1)) and copied["b"][1][1] == "x"
    assert type(copied["b"][1]) is tuple


def test_staging_uses_its_memory_again_and_follows_changes_of_shape() -> None:
    staging = Staging()
    first = staging.copy(state(), "file")
    assert tensor_bytes(state()) == 4 * (6 + 2 + 1)
    again = staging.copy(state(), "file")
    assert again["a"].data_ptr() == first["a"].data_ptr()
    assert staging.copy(state(), "other")["a"].data_ptr() != first["a"].data_ptr()
    longer = staging.copy({"a": torch.arange(9, dtype=torch.int64)}, "file")
    assert torch.equal(longer["a"], torch.arange(9))
