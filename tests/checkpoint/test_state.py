"""Saving commits all or nothing, keeps what it was told to keep, and restoring puts a run back where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.archive import load_config, to_plain
from pipeline.checkpoint import files, manifest
from pipeline.checkpoint import save as saving
from pipeline.checkpoint.manifest import LATEST, complete_checkpoints, newest, problems, read_manifest
from pipeline.checkpoint.save import Moment, Saver
from pipeline.checkpoint.state import (
    check_resumable,
    find_checkpoint,
    load_trainable,
    restore,
    rng_state,
    seed_all,
    set_rng_state,
)
from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Progress, Run
from pipeline.system import CarryEntry, ParameterGroup, Phase
from pipeline.systems.miras.config import MirasConfig

STREAMS = [range(2)]


class Unwritable:
    """Raises `failure` when it is written."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def __reduce__(self) -> Any:
        raise self.failure


class FakeEngine:
    """DeepSpeed's part of a checkpoint: one file. Writing it raises `failure`."""

    stage = 3

    def __init__(self) -> None:
        self.module = nn.Linear(3, 2)
        self.failure: Exception | None = None

    def collect(self, folder: Path, tag: str) -> dict[Path, Any]:
        content = self.module.state_dict() if self.failure is None else Unwritable(self.failure)
        return {folder / tag / "shard.pt": content}

    def load(self, checkpoint: Path) -> None:
        self.module.load_state_dict(torch.load(checkpoint / "shard.pt", weights_only=True))


class FakeLoader:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"streams": {"0": {"offset": 5}, "1": {"offset": 9}}, "fingerprint": {"texts": 3}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, value: dict[str, Any]) -> None:
        if value["fingerprint"] != {"texts": 3}:
            raise UserError("the data differs")
        self.state = value


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(step: int = 0, keep: int = 2, topology: Topology | None = None) -> Run:
        config = replace(miras_tiny(), output_dir=tmp_path, keep=keep, parallel__sequence=1)
        run = Run(config, topology or Topology(), torch.device("cpu"), None, tmp_path)  # type: ignore[arg-type]
        run.engine = FakeEngine()  # type: ignore[assignment]
        run.phase = Phase("train", 150, (ParameterGroup("all", ("weight",)),))
        run.progress = Progress(step=step, phase="train", tokens=10 * step, elapsed=0.5 * step)
        return run

    return make


def moment(run: Run, step: int) -> Moment:
    run.progress.step = step
    carries = [{"x": CarryEntry(torch.tensor([step, -step]))}]
    return Moment(dataclasses.replace(run.progress), FakeLoader().state_dict(), rng_state(), carries)


def save(run: Run, step: int) -> Path:
    (name,) = Saver(run, STREAMS).save(moment(run, step))
    return run.folder / "checkpoints" / name


def steps(run: Run) -> list[int]:
    return [int(path.name.split("-")[1]) for path in complete_checkpoints(run.folder / "checkpoints")]


def latest(run: Run) -> Path:
    folder = run.folder / "checkpoints"
    return folder / (folder / LATEST).read_text().strip()


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
    [(saving, "save_file"), (saving, "_write_json"), (saving, "save_config"), (files.os, "fsync"),
     (saving, "write_manifest"), (saving, "commit"), (manifest.os, "replace")],
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
    assert latest(run) == older == newest(older.parent)
    assert problems(save(run, 6), hashes=True) == []


@pytest.mark.parametrize(
    "owner, function, failure",
    [
        (
            saving,
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


def test_restore_puts_everything_back(make_run) -> None:
    run = make_run()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    folder = save(run, 7)
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    resumed = make_run()
    loader = FakeLoader()
    loader.state = {}
    (carry,) = restore(resumed, folder, loader, STREAMS)  # type: ignore[arg-type]
    assert resumed.progress == Progress(step=7, phase="train", tokens=0, elapsed=0.0)
    assert torch.equal(resumed.engine.module.weight, run.engine.module.weight)
    assert loader.state["streams"]["1"] == {"offset": 9}
    assert carry["x"].tensor.tolist() == [7, -7]
    assert resumed.last_checkpoint == "checkpoint-7"
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def damaged_facts(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_of_another_system_is_refused(make_run) -> None:
    folder = save(make_run(), 7)
    damaged_facts(folder, system="olmo")
    with pytest.raises(UserError, match=rf"{folder} was saved with system olmo, this run has miras"):
        check_resumable(make_run().config, folder)


def test_other_frozen_weights_are_refused_before_anything_changes(make_run) -> None:
    folder = save(make_run(), 7)
    damaged_facts(folder, frozen={"parameters": 2, "sha256": "0" * 64})
    run = make_run()
    before = run.engine.module.weight.clone()
    with pytest.raises(UserError, match="other frozen weights"):
        restore(run, folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]
    assert torch.equal(run.engine.module.weight, before) and run.progress.step == 0


def test_a_flipped_byte_is_refused_before_anything_changes(make_run) -> None:
    folder = save(make_run(), 7)
    content = bytearray((folder / "shard.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "shard.pt").write_bytes(content)
    run = make_run()
    with pytest.raises(UserError, match=r"shard\.pt: content differs from its hash: restore the file"):
        restore(run, folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]
    assert run.progress.step == 0


def test_ranks_that_had_no_predecessor_draw_numbers_of_their_own(make_run) -> None:
    folder = save(make_run(), 7)
    damaged_facts(folder, world=2)
    seed_all(0, "step 7, rank 0 of 1")
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    seed_all(0, "step 7, rank 1 of 2")
    assert random.random() != expected[0]
    seed_all(0, "step 7, rank 0 of 1")
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


@pytest.mark.parametrize(
    "flags, refused",
    [
        ({}, None),
        ({"context": 7, "gradient_chunk": 5}, None),
        ({"attachment": "mag"}, "--model.memory.attachment None, this run has mag"),
        ({"rule": "delta"}, "--model.memory.rule titans, this run has delta"),
    ],
)
def test_a_run_of_before_a_field_existed_did_what_its_default_does(
    tmp_path: Path, flags: dict[str, Any], refused: str | None
) -> None:
    """Fields that the rule and the attachment do not use are no difference either."""
    config = miras_tiny()
    saved = to_plain(config)
    for new in ("attachment", "context", "gradient_chunk", "moneta", "yaad", "memora", "mlp", "swiglu"):
        del saved["model"]["memory"][new]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    facts = {"format": 1, "system": "miras", "world": 2, "zero_stage": 3, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, **flags)
    now = replace(config, model=dataclasses.replace(config.model, memory=memory))
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_resumable(now, tmp_path)


def test_other_data_is_refused_in_the_loaders_words(make_run) -> None:
    folder = save(make_run(), 7)
    (folder / "loader.json").write_text('{"streams": {}, "fingerprint": {"texts": 4}}')
    manifest.write_manifest(folder, {**json.loads((folder / "manifest.json").read_text()), "frozen": None})
    with pytest.raises(UserError, match="the data differs"):
        restore(make_run(), folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]


def test_random_states_pass_through_a_file_that_holds_no_code(tmp_path: Path) -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    # Away from a fresh seed, with half a pair of normal numbers kept back.
    random.gauss(0, 1)
    np.random.randn()
    torch.randn(3)
    torch.save(rng_state(), tmp_path / "rng.pt")

    def numbers() -> list[float]:
        drawn = [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand()]
        return [*drawn, *torch.randn(3).tolist(), *torch.rand(3).tolist()]

    expected = numbers()
    assert numbers() != expected
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert numbers() == expected


class TestFindCheckpoint:
    def config(self, run: Run, resume: str) -> Any:
        return replace(run.config, resume=resume)

    def test_auto_starts_afresh_where_there_is_none(self, make_run) -> None:
        assert find_checkpoint(self.config(make_run(), "auto"), Topology()) is None

    def test_auto_and_must_take_the_newest(self, make_run) -> None:
        run = make_run()
        save(run, 5)
        folder = save(run, 10)
        for resume in ("auto", "must"):
            assert find_checkpoint(self.config(run, resume), Topology()) == folder

    def test_must_fails_where_there_is_none(self, make_run) -> None:
        with pytest.raises(UserError, match="--resume must: no complete checkpoint"):
            find_checkpoint(self.config(make_run(), "must"), Topology())

    def test_never_refuses_to_bury_a_run(self, make_run) -> None:
        run = make_run()
        assert find_checkpoint(self.config(run, "never"), Topology()) is None
        save(run, 5)
        with pytest.raises(UserError, match="name another --output-dir"):
            find_checkpoint(self.config(run, "never"), Topology())

    def test_a_path_is_taken_as_it_is(self, make_run) -> None:
        run = make_run()
        older = save(run, 5)
        save(run, 10)
        assert find_checkpoint(self.config(run, str(older)), Topology()) == older

    def test_a_damaged_path_is_refused_by_its_damage(self, make_run) -> None:
        run = make_run()
        folder = save(run, 5)
        (folder / "shard.pt").unlink()
        with pytest.raises(UserError, match=r"--resume .*shard\.pt: missing"):
            find_checkpoint(self.config(run, str(folder)), Topology())

    def test_a_path_that_is_not_there_is_said_to_be_absent(self, make_run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--resume .*absent: no such"):
            find_checkpoint(self.config(make_run(), str(tmp_path / "absent")), Topology())

    def test_damage_everywhere_stops_the_run(self, make_run) -> None:
        run = make_run()
        (save(run, 5) / "shard.pt").unlink()
        with pytest.raises(UserError, match="missing: restore the file, or use another --output-dir"):
            find_checkpoint(self.config(run, "auto"), Topology())


class TestLoadTrainable:
    def test_it_fills_what_was_trained_and_leaves_the_rest(self, make_run) -> None:
        run = make_run()
        folder = save(run, 5)
        model = nn.Linear(3, 2)
        bias = model.bias.clone()
        load_trainable(model, folder, Topology())
        assert torch.equal(model.weight, run.engine.module.weight)
        assert torch.equal(model.bias, bias)

    def test_a_folder_without_weights_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no trainable\.safetensors there"):
            load_trainable(nn.Linear(3, 2), tmp_path, Topology())

    def test_a_parameter_of_another_model_is_named(self, tmp_path: Path) -> None:
        save_file({"gate": torch.zeros(2)}, tmp_path / "trainable.safetensors")
        with pytest.raises(UserError, match="'gate' is no parameter of this model"):
            load_trainable(nn.Linear(3, 2), tmp_path, Topology())

    def test_another_shape_is_named(self, make_run) -> None:
        folder = save(make_run(), 5)
        with pytest.raises(UserError, match=r"'weight' is \(2, 3\), the model wants \(2, 4\)"):
            load_trainable(nn.Linear(4, 2), folder, Topology())

    def test_a_truncated_file_is_named(self, make_run) -> None:
        folder = save(make_run(), 5)
        path = folder / "trainable.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UserError, match=r"trainable\.safetensors"):
            load_trainable(nn.Linear(3, 2), folder, Topology())


def test_cursors_of_all_data_ranks_are_saved_together() -> None:
    other = {"streams": {"2": {"offset": 1}}, "fingerprint": {"texts": 3}}
    merged = saving._merged([FakeLoader().state_dict(), other])
    assert merged["streams"] == {"0": {"offset": 5}, "1": {"offset": 9}, "2": {"offset": 1}}
    assert merged["fingerprint"] == {"texts": 3}


class TestInTheBackground:
    def test_it_holds_what_the_weights_were_when_it_began(self, make_run) -> None:
        run = make_run()
        saver = Saver(run, STREAMS)
        for step in (5, 6):
            weight = run.engine.module.weight.clone()
            assert saver.save(moment(run, step), background=True) == ([] if step == 5 else ["checkpoint-5"])
            with torch.no_grad():
                run.engine.module.weight.add_(1)
        (name,) = saver.finish()
        saver.close()
        folder = run.folder / "checkpoints" / name
        assert torch.equal(load_file(folder / "trainable.safetensors")["weight"], weight)
        assert torch.equal(torch.load(folder / "shard.pt", weights_only=True)["weight"], weight)
        assert problems(folder, hashes=True) == [] and latest(run) == folder
        assert saver.finish() == saver.poll() == []

    def test_nothing_is_committed_before_it_is_on_disk(self, make_run, monkeypatch: pytest.MonkeyPatch) -> None:
        run, go = make_run(), threading.Event()
        older = save(run, 5)
        write = saving._write
        monkeypatch.setattr(saving, "_write", lambda *arguments: go.wait() and write(*arguments))
        saver = Saver(run, STREAMS)
        saver.save(moment(run, 6), background=True)
        assert saver.poll() == [] and latest(run) == older and steps(run) == [5]
        go.set()
        assert saver.finish() == ["checkpoint-6"]
        saver.close()

    def test_its_failure_is_seen(self, make_run) -> None:
        run = make_run()
        older = save(run, 5)
        run.engine.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saver = Saver(run, STREAMS)
        staging = saver._staging.copy
        saver._staging.copy = lambda value, *place: value if isinstance(value, Unwritable) else staging(value, *place)
        saver.save(moment(run, 6), background=True)
        with pytest.raises(UserError, match=r"checkpoint-6 was not saved .*No space left"):
            saver.finish()
        saver.close()
        assert latest(run) == older and {path.name for path in older.parent.iterdir()} == {LATEST, older.name}


def test_a_run_directory_can_be_moved(make_run, tmp_path: Path) -> None:
    folder = save(make_run(), 5)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert problems(moved, hashes=True) == []
