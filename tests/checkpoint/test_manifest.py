"""A checkpoint is complete or it is not there, and damage is found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import manifest
from pipeline.checkpoint.files import hash_of
from pipeline.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    commit,
    complete_checkpoints,
    newest,
    problems,
    read_manifest,
    write_manifest,
)
from pipeline.errors import UserError
from tests.checkpoint.whole import change_facts, write_whole

FILES = {"weights.bin": b"w" * 5000, "shards/rank0.bin": b"0" * 300, "state.json": b"{}"}


def fill(folder: Path, step: int = 1) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_whole(folder, {"step": step})
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fill(tmp_path / "checkpoint-1")


@pytest.fixture
def save(tmp_path: Path) -> Callable[[int], Path]:
    """Writes and commits a whole checkpoint as a run does."""

    def make(step: int) -> Path:
        final = tmp_path / f"checkpoint-{step}"
        commit(fill(tmp_path / f".checkpoint-{step}.partial", step), final, tmp_path / LATEST)
        return final

    return make


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_has_no_problems(checkpoint: Path) -> None:
    assert problems(checkpoint, hashes=False) == problems(checkpoint, hashes=True) == []


def test_the_manifest_lists_every_file_and_the_facts(checkpoint: Path) -> None:
    content = read_manifest(checkpoint)
    assert content is not None and content["step"] == 1
    assert set(content["files"]) == set(FILES)
    assert content["files"]["weights.bin"] == {"size": 5000, "xxh128": hash_of(checkpoint / "weights.bin")}


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(checkpoint: Path, name: str, hashes: bool) -> None:
    (checkpoint / name).unlink()
    assert problems(checkpoint, hashes=hashes) == [f"{checkpoint / name}: missing"]


@pytest.mark.parametrize("hashes", [False, True])
def test_a_truncated_file_is_named_with_its_sizes(checkpoint: Path, hashes: bool) -> None:
    (checkpoint / "weights.bin").write_bytes(b"w" * 4999)
    assert problems(checkpoint, hashes=hashes) == [f"{checkpoint / 'weights.bin'}: 4999 bytes instead of 5000"]


def test_a_flipped_byte_is_found_by_its_hash(checkpoint: Path) -> None:
    flip_a_byte(checkpoint / "shards" / "rank0.bin")
    assert problems(checkpoint, hashes=False) == []
    assert problems(checkpoint, hashes=True) == [
        f"{checkpoint / 'shards' / 'rank0.bin'}: content differs from its hash"
    ]


def test_every_problem_is_a_line(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()
    flip_a_byte(checkpoint / "weights.bin")
    assert len(problems(checkpoint, hashes=True)) == 2


def test_a_folder_without_a_manifest_is_not_complete(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    assert read_manifest(checkpoint) is None
    (problem,) = problems(checkpoint, hashes=False)
    assert str(checkpoint) in problem and MANIFEST in problem


@pytest.mark.parametrize("content", ["", '{"step": 1, "fil', "[]", '{"step": 1}', "\x00\x00"], ids=ascii)
def test_a_damaged_manifest_is_a_problem_and_not_a_crash(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST).write_text(content)
    (problem,) = problems(checkpoint, hashes=False)
    assert MANIFEST in problem and "\n" not in problem


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    whole, before = path.read_bytes(), read_manifest(checkpoint)
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found = problems(checkpoint, hashes=False)
            assert found == [f"{path}: damaged"] or (not found and read_manifest(checkpoint) == before), (place, bit)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../outside.pt": {"size": 3, "xxh128": "0" * 32}}},
        {"files": {"/etc/passwd": {"size": 3, "xxh128": "0" * 32}}},
        {"files": {"a\\b": {"size": 3, "xxh128": "0" * 32}}},
        {"files": ["shard.pt"]},
        {"files": {"shard.pt": 5}},
        {"files": {"shard.pt": {"size": "3", "xxh128": "0" * 32}}},
        {"files": {"shard.pt": {"size": -1, "xxh128": "0" * 32}}},
        {"files": {"shard.pt": {"size": 3}}},
        {"files": None},
        {"written": None},
        {"written": 10**40},
        {"step": "7"},
        {"world": 2.0},
        {"data": True},
        {"zero_stage": [3]},
    ],
    ids=str,
)
def test_a_manifest_that_its_hash_fits_must_still_be_one(checkpoint: Path, changes: dict[str, Any]) -> None:
    """The hash says that nobody changed it, not who wrote it: a name elsewhere would be written by a conversion."""
    change_facts(checkpoint, **changes)
    with pytest.raises(UserError, match=rf"{checkpoint / MANIFEST}: damaged"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "9" * 5000, '{"a": 1, "a": 1}', "\0" * 512])
def test_a_manifest_that_no_parser_reads_is_damaged(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=rf"{checkpoint / MANIFEST}: damaged"):
        read_manifest(checkpoint)


def test_a_manifest_that_may_not_be_read_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert problems(checkpoint, hashes=False) == [f"{checkpoint / MANIFEST}: cannot be read (Permission denied)"]


def test_no_folder_or_an_empty_one_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None


def test_the_newest_is_the_one_written_last(save, tmp_path: Path) -> None:
    paths = [save(step) for step in (900, 1000)]
    assert newest(tmp_path) == paths[1]
    # A run that went back to an earlier step goes on from there.
    paths.append(save(20))
    assert newest(tmp_path) == paths[2]
    assert complete_checkpoints(tmp_path) == [paths[2], paths[0], paths[1]]


def test_a_clock_that_goes_back_makes_no_checkpoint_older(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may go on at a machine whose clock is behind that of the one before."""
    save(10)
    monkeypatch.setattr(manifest.time, "time_ns", lambda: 5)
    later = save(20)
    assert newest(tmp_path) == later


def test_an_unfinished_save_is_no_checkpoint(save, tmp_path: Path) -> None:
    first = save(10)
    fill(tmp_path / ".checkpoint-20.partial")
    assert complete_checkpoints(tmp_path) == [first]
    assert newest(tmp_path) == first


def test_a_copy_that_a_person_made_is_left_alone(save, tmp_path: Path) -> None:
    first = save(10)
    shutil.copytree(first, tmp_path / "checkpoint-10-good")
    shutil.copytree(first, tmp_path / "checkpoint-10.bak")
    assert newest(tmp_path) == first
    assert complete_checkpoints(tmp_path) == [first]


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "no manifest"])
def test_a_damaged_newest_is_not_passed_over(save, tmp_path: Path, damage: str) -> None:
    """A run that went on from the one before would write over it in time; which one to take is for a person to say."""
    older, newer = save(10), save(20)
    match damage:
        case "missing":
            (newer / "weights.bin").unlink()
        case "truncated":
            (newer / "weights.bin").write_bytes(b"w")
        case "manifest":
            (newer / MANIFEST).write_text('{"step": 20, "fil')
        case "no manifest":
            (newer / MANIFEST).unlink()
    with pytest.raises(UserError, match=f"checkpoint-20.*restore the file, or go on from .* with --resume {older}"):
        newest(tmp_path)


def test_a_damaged_older_one_does_not_matter(save, tmp_path: Path) -> None:
    older, newer = save(10), save(20)
    (older / "weights.bin").unlink()
    assert newest(tmp_path) == newer


def test_files_of_other_ranks_that_are_not_seen_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"123")
    here = {"mine": {"size": 3, "xxh128": hash_of(tmp_path / "mine")}}
    for theirs in ({"size": 3, "xxh128": "0"}, None):
        files = here | ({"theirs": theirs} if theirs else {"mine": {"size": 4, "xxh128": "0"}})
        with pytest.raises(UserError, match="must be on a file system that all nodes share"):
            write_manifest(tmp_path, {}, files)
        assert not (tmp_path / MANIFEST).exists()
    write_manifest(tmp_path, {}, here)
    assert problems(tmp_path, hashes=True) == []


def test_ranks_share_the_reading_of_a_checkpoint(checkpoint: Path) -> None:
    for name in FILES:
        flip_a_byte(checkpoint / name)
    found = [problems(checkpoint, hashes=True, part=(rank, 2)) for rank in range(2)]
    assert [len(lines) for lines in found] == [2, 1]
    assert sorted(found[0] + found[1]) == sorted(problems(checkpoint, hashes=True))


def test_what_cut_off_saves_left_is_cleared_and_what_was_set_aside_comes_back(save, tmp_path: Path) -> None:
    for step in (10, 20):
        save(step)
    os.rename(tmp_path / "checkpoint-10", tmp_path / ".checkpoint-10.replaced")
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / ".checkpoint-20.replaced")
    for name in (".checkpoint-30.partial", ".checkpoint-5.removed", ".checkpoint-20.universal"):
        fill(tmp_path / name)
    manifest.recover(tmp_path)
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-10", tmp_path / "checkpoint-20"]
    assert (tmp_path / ".checkpoint-30.partial").is_dir()
    manifest.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20", LATEST]


def test_when_all_are_damaged_nothing_starts_afresh(save, tmp_path: Path) -> None:
    for step in (10, 20):
        (save(step) / "weights.bin").unlink()
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "checkpoint-20" / "weights.bin") in message and "missing" in message
    assert "--resume never" in message or "--output-dir" in message
    assert "\n" not in message


def test_a_lost_manifest_of_the_only_checkpoint_does_not_start_afresh(save, tmp_path: Path) -> None:
    """A folder has its final name only once it was complete: without a manifest it is damaged, not unfinished."""
    (save(10) / MANIFEST).unlink()
    with pytest.raises(UserError, match="checkpoint-10"):
        newest(tmp_path)


def test_commit_names_the_folder_and_points_latest_at_it(save, tmp_path: Path) -> None:
    save(10)
    save(20)
    assert (tmp_path / LATEST).read_text() == "checkpoint-20\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20", LATEST]


class Died(Exception):
    """The process ended here."""


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_crash_within_commit_leaves_latest_at_a_complete_checkpoint(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """Two replacements make a commit, the folder's and then `latest`'s: the process dies before either."""
    older = save(10)
    replace, calls = os.replace, []

    def replace_or_die(source: Path, target: Path) -> None:
        if len(calls) == replaced:
            raise Died
        calls.append((Path(source).name, Path(target).name))
        replace(source, target)

    partial = fill(tmp_path / ".checkpoint-20.partial", 20)
    monkeypatch.setattr(manifest.os, "replace", replace_or_die)
    with pytest.raises(Died):
        commit(partial, tmp_path / "checkpoint-20", tmp_path / LATEST)
    monkeypatch.undo()
    assert calls == [(".checkpoint-20.partial", "checkpoint-20")][:replaced]
    assert (tmp_path / LATEST).read_text() == "checkpoint-10\n"
    assert newest(tmp_path) == (tmp_path / "checkpoint-20" if replaced else older)
    # The next save goes on as if nothing had happened.
    assert save(30) == newest(tmp_path)
    assert (tmp_path / LATEST).read_text() == "checkpoint-30\n"


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_crash_while_a_step_is_saved_again_does_not_stop_the_next_save(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """Saving a step again takes one replacement more, which puts the old folder aside."""
    older = save(10)
    save(20)
    replace, calls = os.replace, []

    def replace_or_die(source: Path, target: Path) -> None:
        if len(calls) == replaced:
            raise Died
        calls.append(source)
        replace(source, target)

    partial = fill(tmp_path / ".checkpoint-20.partial", 20)
    monkeypatch.setattr(manifest.os, "replace", replace_or_die)
    with pytest.raises(Died):
        commit(partial, tmp_path / "checkpoint-20", tmp_path / LATEST)
    monkeypatch.undo()
    manifest.recover(tmp_path)
    assert newest(tmp_path) in (older, tmp_path / "checkpoint-20")
    assert (tmp_path / "checkpoint-20").is_dir(), "the step that was there is never lost"
    shutil.rmtree(partial, ignore_errors=True)
    for _ in range(2):
        assert save(20) == newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20", LATEST]


def test_latest_is_never_written_in_place(save, tmp_path: Path) -> None:
    """A hard link to the old file keeps the old text: the name was replaced, not the content."""
    save(10)
    os.link(tmp_path / LATEST, tmp_path / "link")
    save(20)
    assert (tmp_path / "link").read_text() == "checkpoint-10\n"


def test_the_manifest_is_written_whole_or_not_at_all(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (checkpoint / MANIFEST).read_text()

    def die(*arguments: object, **options: object) -> None:
        raise Died

    monkeypatch.setattr(json, "dump", die)
    with pytest.raises(Died):
        write_whole(checkpoint, {"step": 2})
    assert (checkpoint / MANIFEST).read_text() == before
