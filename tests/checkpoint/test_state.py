"""Finding the checkpoint to go on from, and putting a run back where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoint import state
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.state import (
    check_resumable,
    find_checkpoint,
    keep_global_batch,
    load_trainable,
    restore,
    rng_state,
    seed_all,
    set_rng_state,
)
from pipeline.config import replace
from pipeline.config_file import to_plain
from pipeline.errors import RankError, UserError
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.run import Progress, Run
from pipeline.systems.miras.config import MirasConfig
from tests.checkpoint.small_runs import STREAMS, Averaging, FakeLoader, save
from tests.checkpoint.whole import change_facts, write_whole


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


def test_a_checkpoint_of_another_system_is_refused(make_run) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, system="olmo")
    with pytest.raises(UserError, match=rf"{folder} was saved with system olmo, this run has miras"):
        check_resumable(make_run().config, folder)


def test_other_frozen_weights_are_refused_before_anything_changes(make_run) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, frozen={"parameters": 2, "sha256": "0" * 64})
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


@pytest.mark.parametrize("place", ["shard", "rng"])
def test_what_one_rank_alone_finds_is_said_by_that_rank(make_run, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder = save(make_run(), 7)

    def refuse(*_: object) -> None:
        raise UserError(f"{place}: holds something else")

    run = make_run()
    monkeypatch.setattr(*((run.engine, "load", refuse) if place == "shard" else (state, "load_pickle", refuse)))
    with pytest.raises(RankError, match=f"rank 0: {place}: holds something else"):
        restore(run, folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]


@pytest.mark.parametrize("flipped", [1, 128])
def test_a_flip_in_the_archived_config_is_damage_and_no_difference_of_models(make_run, flipped: int) -> None:
    folder = save(make_run(), 7)
    path = folder / "config.yaml"
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"config\.yaml: content differs from its hash: restore the file"):
            check_resumable(make_run().config, folder)


@pytest.mark.parametrize("key", ["world", "zero_stage", "optimizer", "order"])
def test_shards_of_another_layout_are_not_loaded_by_place(make_run, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, **{key: 2})
    converted = []
    monkeypatch.setattr(state, "_load_elsewhere", lambda run, checkpoint: converted.append(checkpoint))
    restore(make_run(), folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]
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
    write_whole(tmp_path, {"format": 1, "system": "miras", "world": 2, "zero_stage": 3})
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, **flags)
    now = replace(config, model=dataclasses.replace(config.model, memory=memory))
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_resumable(now, tmp_path)


@pytest.mark.parametrize(
    "section, changes, refused",
    [
        ("attention", {"backend": "sdpa"}, None),
        ("memory", {"backend": "torch", "chunk": 16}, None),
        ("backbone", {"lr_scale": 0.5}, None),
        ("memory", {"gradient_chunk": 5, "context": 7}, None),
        ("memory", {"conv": 3}, "--model.memory.conv 4, this run has 3"),
        ("backbone", {"norm_eps": 1e-5}, "--model.backbone.norm-eps 1e-06, this run has 1e-05"),
    ],
)
def test_a_resume_may_change_what_leaves_the_model_the_same(
    make_run, section: str, changes: dict[str, Any], refused: str | None
) -> None:
    """The fields say so themselves; the memory ignores what its rule and attachment do not use."""
    run = make_run()
    folder = save(run, 7)
    model = run.config.model
    now = replace(
        run.config,
        model=dataclasses.replace(model, **{section: dataclasses.replace(getattr(model, section), **changes)}),
    )
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_resumable(now, folder)


@pytest.mark.parametrize("name", ["carry-00007.safetensors", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_file_of_another_checkpoint_is_not_read_with_this_one(make_run, name: str) -> None:
    """They are found by their names: a stray carry would give a stream heads, or a state, that are another one's."""
    folder = save(make_run(), 7)
    (folder / "notes.txt").write_text("mine")
    restore(make_run(), folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]
    (folder / name).write_bytes(next(folder.glob("carry-*")).read_bytes())
    run = make_run()
    with pytest.raises(UserError, match=f"{folder / name}: not in the manifest, and would be read like the rest"):
        restore(run, folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]
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
        restore(make_run(), folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]

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
        restore(run, folder, FakeLoader(), STREAMS)  # type: ignore[arg-type]
    assert torch.equal(run.engine.module.weight, before) and run.progress.step == 0


def test_other_data_is_refused_in_the_loaders_words(make_run) -> None:
    folder = save(make_run(), 7)
    (folder / "loader.json").write_text('{"streams": {}, "fingerprint": {"texts": 4}}')
    write_whole(folder, read_manifest(folder) or {})
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

    def test_never_does_not_bury_a_damaged_run_either(self, make_run) -> None:
        run = make_run()
        (save(run, 5) / "manifest.json").unlink()
        with pytest.raises(UserError, match="name another --output-dir"):
            find_checkpoint(self.config(run, "never"), Topology())

    def test_a_path_elsewhere_says_where_a_run_began_and_not_where_it_is(self, make_run, tmp_path: Path) -> None:
        run = make_run()
        origin = save(run, 5)
        config = replace(self.config(run, str(origin)), output_dir=tmp_path / "other")
        assert find_checkpoint(config, Topology()) == origin
        other = make_run()
        other.config = replace(other.config, output_dir=tmp_path / "other")
        own = save(other, 8)
        assert find_checkpoint(config, Topology()) == own, "the same command goes on"

    def test_a_run_directory_means_its_newest(self, make_run, tmp_path: Path) -> None:
        run = make_run()
        save(run, 5)
        folder = save(run, 10)
        config = replace(self.config(run, str(tmp_path)), output_dir=tmp_path / "other")
        assert find_checkpoint(config, Topology()) == folder

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

    def test_moving_averages_come_back_with_the_weights(self, make_run) -> None:
        run = make_run()
        run.engine.module = trained = Averaging()
        trained(torch.tensor([1.0, 2.0, 4.0]))
        folder = save(run, 5)
        assert set(load_file(folder / "trainable.safetensors")) == {"weight", "average", "count"}
        model = Averaging()
        load_trainable(model, folder, Topology())
        assert torch.equal(model.weight, trained.weight)
        assert model.average.tolist() == [0.5, 1, 2] and model.count == 1
        assert not model.scratch.any(), "it is in no state_dict"

    def test_they_may_be_of_another_precision(self, tmp_path: Path) -> None:
        save_file({"average": torch.full((3,), 0.5, dtype=torch.bfloat16)}, tmp_path / "trainable.safetensors")
        model = Averaging()
        load_trainable(model, tmp_path, Topology())
        assert model.average.tolist() == [0.5] * 3 and model.average.dtype == torch.float32

    def test_a_checkpoint_without_them_leaves_them_as_they_are(self, make_run) -> None:
        run = make_run()
        folder = save(run, 5)
        model = Averaging()
        model(torch.ones(3))
        load_trainable(model, folder, Topology())
        assert torch.equal(model.weight, run.engine.module.weight)
        assert model.average.tolist() == [0.5] * 3 and model.count == 1

    @pytest.mark.parametrize(
        "stored, message",
        [
            ({"average": torch.ones(4)}, r"'average' is \(4,\), the model wants \(3,\)"),
            ({"count": torch.tensor(0.5)}, r"'count' is torch\.float32, the model wants torch\.int64"),
            ({"scratch": torch.ones(3)}, "'scratch' is no parameter of this model"),
        ],
    )
    def test_buffers_of_another_model_are_named_before_anything_is_filled(
        self, tmp_path: Path, stored: dict[str, torch.Tensor], message: str
    ) -> None:
        save_file({"weight": torch.full((2, 3), 7.0), **stored}, tmp_path / "trainable.safetensors")
        model = Averaging()
        with pytest.raises(UserError, match=message):
            load_trainable(model, tmp_path, Topology())
        assert not model.weight.eq(7).any()

    def test_a_flipped_byte_is_found_where_there_is_a_hash(self, make_run) -> None:
        run = make_run()
        folder = save(run, 7)
        path = folder / "trainable.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=r"trainable\.safetensors: content differs from its hash"):
            load_trainable(nn.Linear(3, 2), folder, Topology())
        # What was exported has none.
        (folder / "manifest.json").unlink()
        load_trainable(nn.Linear(3, 2), folder, Topology())

    def test_a_folder_without_weights_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no trainable\.safetensors there"):
            load_trainable(nn.Linear(3, 2), tmp_path, Topology())

    def test_a_parameter_of_another_model_is_named(self, tmp_path: Path) -> None:
        save_file({"gate": torch.zeros(2)}, tmp_path / "trainable.safetensors")
        with pytest.raises(UserError, match="'gate' is no parameter of this model"):
            load_trainable(nn.Linear(3, 2), tmp_path, Topology())

    def test_another_shape_is_named(self, make_run) -> None:
        folder = save(make_run(), 5)
        with pytest.raises(
            UserError, match=r"'weight' in trainable\.safetensors is \(2, 3\), the model wants \(2, 4\)"
        ):
            load_trainable(nn.Linear(4, 2), folder, Topology())

    def test_a_truncated_file_is_named(self, make_run) -> None:
        folder = save(make_run(), 5)
        path = folder / "trainable.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UserError, match=r"trainable\.safetensors"):
            load_trainable(nn.Linear(3, 2), folder, Topology())
