"""The weights of a folder are those of the files that make up the model, and no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.parallel.weight_files import INDEX, SINGLE, file_tensors, model_tensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": FIRST, "b": FIRST, "c": SECOND}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.full((2,), 1.0), "b": torch.full((3,), 2.0)}, folder / FIRST)
    save_file({"c": torch.full((4,), 3.0)}, folder / SECOND)
    write_index(folder, MAP)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {name: str(stored.file.relative_to(folder)) for name, stored in model_tensors(folder).items()}


def refusal(folder: Path, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        model_tensors(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for part in parts:
        assert part in message
    return message


def test_an_index_says_which_files_hold_what(folder: Path) -> None:
    assert files(folder) == MAP
    assert model_tensors(folder)["b"].shape == (3,) and model_tensors(folder)["b"].dtype == "F32"


def test_a_single_file_needs_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file({"a": torch.zeros(2)}, folder / SINGLE)
    assert files(folder) == {"a": SINGLE}


@pytest.mark.parametrize(
    "other",
    [
        "model-00001-of-00003.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.safetensors",
        SINGLE,
        "z.safetensors",
    ],
)
def test_files_of_another_save_are_not_read(folder: Path, other: str) -> None:
    """Read as well, the last name would win, in silence."""
    save_file({"a": torch.full((2,), 9.0), "c": torch.full((4,), 9.0)}, folder / other)
    assert files(folder) == MAP


def test_beside_a_single_file_nothing_else_is_read(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file({"a": torch.zeros(2)}, folder / SINGLE)
    (folder / "broken.safetensors").write_bytes(b"not one")
    assert files(folder) == {"a": SINGLE}


def test_a_tensor_that_no_index_names_is_not_the_models(folder: Path) -> None:
    save_file({"c": torch.zeros(4), "extra": torch.zeros(1)}, folder / SECOND)
    assert files(folder) == MAP


def test_a_tensor_in_two_of_the_named_files_is_refused(folder: Path) -> None:
    save_file({"c": torch.zeros(4), "a": torch.zeros(2)}, folder / SECOND)
    refusal(folder, "'a' is in two of the files", FIRST, SECOND)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    refusal(folder, f"{INDEX}: names {SECOND}, which is not there: copy")


def test_a_missing_shard_beside_a_single_file_says_how_to_take_that(folder: Path) -> None:
    (folder / SECOND).unlink()
    save_file({"a": torch.zeros(2)}, folder / SINGLE)
    refusal(folder, SECOND, f"or remove the index if {SINGLE} is the model")


def test_a_tensor_that_its_file_lacks_is_named(folder: Path) -> None:
    write_index(folder, {**MAP, "d": SECOND})
    refusal(folder, f"'d' is in {SECOND}, which lacks it")
    write_index(folder, {**MAP, "a": SECOND})
    refusal(folder, f"'a' is in {SECOND}, which lacks it (it is in {FIRST})")


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_a_file_cut_short_is_refused(folder: Path, kept: int) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:kept])
    refusal(folder, f"{SECOND}: cannot be read", "copy or save it again")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is given twice"),
        ('{"weight_map": ' + "[" * 5000 + "]" * 5000 + "}", "nested deeper than 100 levels"),
        ("[]", "has no `weight_map`"),
        ('{"weight_map": {}}', "has no `weight_map`"),
        ('{"weight_map": ["a"]}', "has no `weight_map`"),
    ],
)
def test_an_index_that_is_none_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / INDEX).write_text(text)
    refusal(folder, INDEX, reason)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/outside.safetensors", "a\\b", "", ".", "a\0b", 5, None]
)
def test_an_index_cannot_name_a_file_outside_its_folder(folder: Path, name: object) -> None:
    save_file({"c": torch.zeros(4)}, folder.parent / "outside.safetensors")
    write_index(folder, {**MAP, "c": name})
    refusal(folder, INDEX, "which is no file of the folder")


def test_the_links_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """The cache keeps blobs by hash, and folders of links to them."""
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for name in (INDEX, FIRST, SECOND):
        shutil.move(folder / name, tmp_path / "blobs" / name.upper())
        (snapshot / name).symlink_to(Path("../../blobs") / name.upper())
    assert files(snapshot) == MAP
    (tmp_path / "blobs" / SECOND.upper()).unlink()
    refusal(snapshot, SECOND, "which is not there")


@pytest.mark.parametrize("name", [INDEX, SINGLE])
def test_a_link_that_leads_nowhere_is_not_taken_for_an_absent_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "gone")
    if name == INDEX:
        save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    refusal(tmp_path, name)


def test_a_folder_without_a_model_says_what_it_has(tmp_path: Path) -> None:
    refusal(tmp_path, f"holds neither {INDEX} nor {SINGLE}: give a folder as save_pretrained writes it")
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    refusal(tmp_path, "(but adapter_model.safetensors, which no index says to be the model's)")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x10\0\0\0\0\0\0\0{"], ids=str)
def test_a_file_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.safetensors: cannot be read"):
        file_tensors(path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(UserError, match=f"{SINGLE}: no such file"):
        file_tensors(tmp_path / SINGLE)
