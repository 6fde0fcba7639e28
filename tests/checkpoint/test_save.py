"""Saving commits all or nothing, keeps what it was told to keep, and may go on in the background."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.checkpoint import contents, files, manifest
from pipeline.checkpoint import save as saving
from pipeline.checkpoint.manifest import LATEST, newest, problems, read_manifest
from pipeline.checkpoint.save import Saver
from pipeline.config_file import load_config
from pipeline.errors import UserError
from pipeline.recipes import all_recipes
from tests.checkpoint.small_runs import Averaging, FakeLoader, Unwritable, latest, save, snapshot, steps


def test_a_checkpoint_holds_everything_and_is_whole(make_run) -> None:
    run = make_run()
    folder = save(run, 7)
    assert folder.name == "checkpoint-7" == run.last_checkpoint
    assert latest(run) == folder
    assert problems(folder, hashes=True) == []
    content = read_manifest(folder)
    assert content is not None
    assert set(content["files"]) == {
        "trainable.safetensors", "trainer_state.json", "loader.json", "config.yaml", "carry-00000.safetensors",
        "rng-00000.pt", "shard.pt",
    }  # fmt: skip
    facts = {
        "step": 7,
        "recipe": "miras_tiny",
        "system": "miras",
        "world": 1,
        "data": 1,
        "sequence": 1,
        "zero_stage": 3,
    }
    assert {key: content[key] for key in facts} == facts
    assert content["data_fingerprint"] == {"texts": 3}
    assert json.loads((folder / "trainer_state.json").read_text())["tokens"] == 0
    assert load_config(folder / "config.yaml", all_recipes()) == run.config


def test_only_what_was_trained_is_in_the_safetensors_file(make_run) -> None:
    run = make_run()
    content = load_file(save(run, 1) / "trainable.safetensors")
    assert set(content) == {"weight"}
    assert torch.equal(content["weight"], run.engine.module.weight)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(make_run, keep: int) -> None:
    run = make_run(keep=keep)
    for step in (5, 50, 100, 1000):
        folder = save(run, step)
        assert latest(run) == folder == newest(folder.parent)
    assert steps(run) == [5, 50, 100, 1000][-keep:]
    assert {path.name for path in folder.parent.iterdir()} == {LATEST, *(f"checkpoint-{step}" for step in steps(run))}


@pytest.mark.parametrize("keep", [1, 2])
def test_going_on_from_an_older_checkpoint_keeps_what_is_saved_then(make_run, keep: int) -> None:
    """`--resume PATH` of an older checkpoint, or newer ones that are damaged: the run's newest is what it saves now."""
    run = make_run(keep=3)
    for step in (100, 200, 300):
        save(run, step)
    again = make_run(step=100, keep=keep)
    folder = save(again, 150)
    assert folder.is_dir() and latest(again) == folder
    assert newest(folder.parent) == folder


def test_saving_a_step_again_replaces_it(make_run) -> None:
    run = make_run()
    first = save(run, 5)
    (first / "stray").write_text("x")
    with torch.no_grad():
        run.engine.module.weight.fill_(3)
    second = save(run, 5)
    assert not (second / "stray").exists()
    assert load_file(second / "trainable.safetensors")["weight"].eq(3).all()
    assert problems(second, hashes=True) == []


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("write failed\nat")]
)
def test_a_save_that_fails_leaves_the_last_checkpoint_and_nothing_else(make_run, failure: Exception) -> None:
    run = make_run()
    older = save(run, 5)
    run.engine.failure = failure
    with pytest.raises(UserError) as caught:
        save(run, 6)
    assert "checkpoint-6 was not saved" in str(caught.value) and "\n" not in str(caught.value)
    assert latest(run) == older == newest(older.parent)
    assert {path.name for path in older.parent.iterdir()} == {LATEST, older.name}
    assert run.last_checkpoint == older.name
    run.engine.failure = None
    assert save(run, 7) == latest(run)
    assert steps(run) == [5, 7]


@pytest.mark.parametrize(
    "owner, step",
    [(files, "save_file"), (contents, "_write_json"), (contents, "save_config"), (files.os, "fsync"),
     (saving, "write_manifest"), (saving, "commit"), (manifest.os, "replace"), (manifest, "_write_name")],
)  # fmt: skip
def test_a_full_disk_at_any_point_leaves_the_last_checkpoint(
    make_run, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str
) -> None:
    run = make_run()
    older = save(run, 5)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(UserError, match="No space left on device"):
        save(run, 6)
    monkeypatch.undo()
    assert latest(run) == older == newest(older.parent) and steps(run) == [5]
    assert problems(save(run, 6), hashes=True) == []


@pytest.mark.parametrize(
    "owner, function, failure",
    [
        (
            files,
            "save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
        (torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
    ],
    ids=["safetensors", "torch"],
)
def test_a_full_disk_that_a_library_reports_in_its_own_way_is_a_user_error(
    make_run, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, failure: Exception
) -> None:
    """Neither is an OSError. Uncaught on one rank, it leaves the others waiting for it."""
    run = make_run()
    older = save(run, 5)

    def fail(*arguments: object, **options: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        with pytest.raises(UserError, match="checkpoint-6 was not saved"):
            save(run, 6)
    assert latest(run) == older == newest(older.parent)


def test_an_interrupted_save_is_cleared_by_the_next(make_run) -> None:
    run = make_run()
    stale = run.folder / "checkpoints" / ".checkpoint-5.partial"
    stale.mkdir(parents=True)
    (stale / "stray").write_text("x")
    folder = save(run, 5)
    assert not stale.exists() and not (folder / "stray").exists()


def test_cursors_of_all_data_ranks_are_saved_together() -> None:
    other = {"streams": {"2": {"offset": 1}}, "fingerprint": {"texts": 3}}
    merged = contents._merged([FakeLoader().state_dict(), other])
    assert merged["streams"] == {"0": {"offset": 5}, "1": {"offset": 9}, "2": {"offset": 1}}
    assert merged["fingerprint"] == {"texts": 3}


def test_the_position_of_loaders_without_streams_is_saved_once() -> None:
    state = {"epoch": 2, "offset": 5, "fingerprint": {"examples": 7}}
    assert contents._merged([dict(state), dict(state)]) == state


class TestInTheBackground:
    def test_it_holds_what_the_weights_were_when_it_began(self, make_run) -> None:
        run = make_run()
        saver = Saver(run)
        for step in (5, 6):
            weight = run.engine.module.weight.clone()
            assert saver.save(snapshot(run, step), background=True) == ([] if step == 5 else ["checkpoint-5"])
            saver.release()
            with torch.no_grad():
                run.engine.module.weight.add_(1)
        (name,) = saver.finish()
        saver.close()
        folder = run.folder / "checkpoints" / name
        assert torch.equal(load_file(folder / "trainable.safetensors")["weight"], weight)
        assert torch.equal(torch.load(folder / "shard.pt", weights_only=True)["weight"], weight)
        assert problems(folder, hashes=True) == [] and latest(run) == folder
        assert saver.finish() == saver.poll() == []

    def test_it_holds_the_moving_averages_of_its_step(self, make_run) -> None:
        """The forward pass changes them, and waits for no copy."""
        run = make_run()
        run.engine.module = model = Averaging()
        model(torch.ones(3))
        saver = Saver(run)
        saver.save(snapshot(run, 5), background=True)
        model(torch.ones(3))
        (name,) = saver.finish()
        saver.close()
        content = load_file(run.folder / "checkpoints" / name / "trainable.safetensors")
        assert content["average"].tolist() == [0.5] * 3 and content["count"] == 1

    def test_nothing_is_committed_before_it_is_on_disk(self, make_run, monkeypatch: pytest.MonkeyPatch) -> None:
        run, go = make_run(), threading.Event()
        older = save(run, 5)
        write = contents._write_json
        monkeypatch.setattr(contents, "_write_json", lambda *arguments: go.wait() and write(*arguments))
        saver = Saver(run)
        saver.save(snapshot(run, 6), background=True)
        assert saver.poll() == [] and latest(run) == older and steps(run) == [5]
        go.set()
        assert saver.finish() == ["checkpoint-6"]
        saver.close()

    def test_its_failure_is_seen(self, make_run) -> None:
        run = make_run()
        older = save(run, 5)
        run.engine.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saver = Saver(run)
        staging = saver._staging.copy
        saver._staging.copy = lambda value, *place: value if isinstance(value, Unwritable) else staging(value, *place)
        saver.save(snapshot(run, 6), background=True)
        with pytest.raises(UserError, match=r"checkpoint-6 was not saved .*No space left"):
            saver.finish()
        saver.close()
        assert latest(run) == older and {path.name for path in older.parent.iterdir()} == {LATEST, older.name}


def test_a_run_directory_can_be_moved(make_run, tmp_path: Path) -> None:
    folder = save(make_run(), 5)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert problems(moved, hashes=True) == []
