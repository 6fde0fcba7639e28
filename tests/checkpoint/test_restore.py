"""Putting a run back where it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pipeline.checkpoint import restore as restoring
from pipeline.checkpoint.compatibility import check_resumable, keep_global_batch
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.restore import restore
from pipeline.checkpoint.rng import seed_all
from pipeline.errors import RankError, UserError
from pipeline.parallel.topology import Topology
from pipeline.run import Progress
from tests.checkpoint.small_runs import save
from tests.checkpoint.whole import change_facts, write_whole


def test_restore_puts_everything_back(make_run) -> None:
    run = make_run()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    folder = save(run, 7)
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    resumed = make_run()
    loader = resumed.loader
    loader.state = {}
    (carry,) = restore(resumed, folder)
    assert resumed.progress == Progress(step=7, phase="train", tokens=0, elapsed=0.0)
    assert torch.equal(resumed.engine.module.weight, run.engine.module.weight)
    assert loader.state["streams"]["1"] == {"offset": 9}
    assert carry["x"].tensor.tolist() == [7, -7]
    assert resumed.last_checkpoint == "checkpoint-7"
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_other_frozen_weights_are_refused_before_anything_changes(make_run) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, frozen={"parameters": 2, "sha256": "0" * 64})
    run = make_run()
    before = run.engine.module.weight.clone()
    with pytest.raises(UserError, match="other frozen weights"):
        restore(run, folder)
    assert torch.equal(run.engine.module.weight, before) and run.progress.step == 0


def test_a_flipped_byte_is_refused_before_anything_changes(make_run) -> None:
    folder = save(make_run(), 7)
    content = bytearray((folder / "shard.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "shard.pt").write_bytes(content)
    run = make_run()
    with pytest.raises(UserError, match=r"shard\.pt: content differs from its hash: restore the file"):
        restore(run, folder)
    assert run.progress.step == 0


@pytest.mark.parametrize("place", ["shard", "rng"])
def test_what_one_rank_alone_finds_is_said_by_that_rank(make_run, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder = save(make_run(), 7)

    def refuse(*_: object) -> None:
        raise UserError(f"{place}: holds something else")

    run = make_run()
    monkeypatch.setattr(*((run.engine, "load", refuse) if place == "shard" else (restoring, "load_pickle", refuse)))
    with pytest.raises(RankError, match=f"rank 0: {place}: holds something else"):
        restore(run, folder)


@pytest.mark.parametrize("key", ["world", "zero_stage", "optimizer", "order"])
def test_shards_of_another_layout_are_not_loaded_by_place(make_run, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, **{key: 2})
    converted = []
    monkeypatch.setattr(restoring, "_load_elsewhere", lambda run, checkpoint, switches: converted.append(checkpoint))
    restore(make_run(), folder)
    assert converted == [folder]


def test_ranks_that_had_no_predecessor_draw_numbers_of_their_own(make_run) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, world=2)
    seed_all(0, "step 7, rank 0 of 1")
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    seed_all(0, "step 7, rank 1 of 2")
    assert random.random() != expected[0]
    seed_all(0, "step 7, rank 0 of 1")
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


@pytest.mark.parametrize("name", ["carry-00007.safetensors", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_file_of_another_checkpoint_is_not_read_with_this_one(make_run, name: str) -> None:
    """They are found by their names: a stray carry would give a stream heads, or a state, that are another one's."""
    folder = save(make_run(), 7)
    (folder / "notes.txt").write_text("mine")
    restore(make_run(), folder)
    (folder / name).write_bytes(next(folder.glob("carry-*")).read_bytes())
    run = make_run()
    with pytest.raises(UserError, match=f"{folder / name}: not in the manifest, and would be read like the rest"):
        restore(run, folder)
    assert run.progress.step == 0


@pytest.mark.parametrize("fact", ["world", "frozen", "global_batch", "system"])
def test_a_manifest_of_another_version_is_told_from_a_damaged_one(make_run, fact: str) -> None:
    folder = save(make_run(), 7)
    facts = {key: value for key, value in (read_manifest(folder) or {}).items() if key != fact}
    write_whole(folder, {key: value for key, value in facts.items() if key not in ("files", "written")})

    def go_on() -> None:
        config = make_run().config
        check_resumable(config, folder)
        keep_global_batch(config, Topology(), folder)
        restore(make_run(), folder)

    with pytest.raises(UserError, match=rf"manifest\.json: says nothing of '{fact}': it is of another version"):
        go_on()


@pytest.mark.parametrize("text", ['{"step": 7, "stepz": 1}', "[7]", "7", "{", '{"step": 7, "step": 7}'])
def test_a_progress_of_another_version_is_refused_before_anything_changes(make_run, text: str) -> None:
    folder = save(make_run(), 7)
    (folder / "trainer_state.json").write_text(text)
    facts = read_manifest(folder) or {}
    write_whole(folder, {key: value for key, value in facts.items() if key not in ("files", "written")})
    run = make_run()
    before = run.engine.module.weight.clone()
    with pytest.raises(UserError, match=r"trainer_state\.json: not .*restore the file, or resume from another"):
        restore(run, folder)
    assert torch.equal(run.engine.module.weight, before) and run.progress.step == 0


def test_other_data_is_refused_in_the_loaders_words(make_run) -> None:
    folder = save(make_run(), 7)
    (folder / "loader.json").write_text('{"streams": {}, "fingerprint": {"texts": 4}}')
    write_whole(folder, read_manifest(folder) or {})
    with pytest.raises(UserError, match="the data differs"):
        restore(make_run(), folder)
