"""Which checkpoints a run can go on from."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from pipeline.checkpoint.compatibility import check_resumable, check_sizes
from pipeline.config import RunConfig, replace
from pipeline.config_file import to_plain
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.recipes.neuromorphic import neuromorphic_tiny
from pipeline.systems.miras.config import MirasConfig
from tests.checkpoint.small_runs import save
from tests.checkpoint.whole import change_facts, write_whole


def test_a_checkpoint_of_another_system_is_refused(make_run) -> None:
    folder = save(make_run(), 7)
    change_facts(folder, system="olmo")
    with pytest.raises(UserError, match=rf"{folder} was saved with system olmo, this run has miras"):
        check_resumable(make_run().config, folder)


def test_weights_of_other_sizes_are_refused_by_what_differs_in_the_model(tmp_path: Path, make_run) -> None:
    def refusal(config: RunConfig) -> str:
        with pytest.raises(UserError) as refused:
            check_sizes(config, nn.Linear(4, 2), folder)
        return str(refused.value)

    config, folder = make_run().config, save(make_run(), 7)
    check_sizes(config, nn.Linear(3, 2), folder)
    check_sizes(config, nn.Linear(4, 2), tmp_path / "absent")
    # Nothing that differs in the model explains it: the tensor is refused by its name, where it is read.
    check_sizes(config, nn.Linear(4, 2), folder)
    rule = replace(config, model__memory=dataclasses.replace(config.model.memory, rule="delta"))
    assert refusal(rule) == (
        f"--init-from {folder} was trained with --model.memory.rule titans, this run has delta, and its 'weight' is"
        " (2, 3) in place of (2, 4): give --model.memory.rule titans, or a checkpoint that was trained with delta"
    )
    with pytest.raises(UserError, match="was saved with system miras, this run has neuromorphic: give a checkpoint"):
        check_sizes(neuromorphic_tiny(), nn.Linear(4, 2), folder)


@pytest.mark.parametrize("flipped", [1, 128])
def test_a_flip_in_the_saved_config_is_damage_and_no_difference_of_models(make_run, flipped: int) -> None:
    folder = save(make_run(), 7)
    path = folder / "config.yaml"
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"config\.yaml: content differs from its hash: restore the file"):
            check_resumable(make_run().config, folder)


@pytest.mark.parametrize(
    "flags, refused",
    [
        ({}, None),
        ({"context": 7, "gradient_chunk": 5}, None),
        ({"attachment": "mag"}, "--model.memory.attachment residual, this run has mag"),
        ({"rule": "delta"}, "--model.memory.rule titans, this run has delta"),
    ],
)
def test_a_run_older_than_a_field_did_what_its_default_does(
    tmp_path: Path, flags: dict[str, Any], refused: str | None
) -> None:
    """Fields that the rule and the attachment do not use are no difference either."""
    config = miras_tiny()
    saved = to_plain(config)
    for new in ("attachment", "context", "gradient_chunk", "moneta", "yaad", "memora", "mlp", "swiglu"):
        del saved["model"]["memory"][new]
    # A whole section, too.
    del saved["model"]["distillation"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    write_whole(tmp_path, {"format": 1, "system": "miras", "world": 2, "zero_stage": 3})
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, **flags)
    now = replace(config, model=dataclasses.replace(config.model, memory=memory))
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_resumable(now, tmp_path)


@pytest.mark.parametrize("place", ["model", "data"])
@pytest.mark.parametrize(
    "saved, now, refused",
    [
        ({}, {}, None),
        ({"pairs": 4, "queries": 4}, {"pairs": 4, "queries": 4}, None),
        ({}, {"pairs": 4, "queries": 4}, "--data.recall.pairs 8, this run has 4"),
        ({"max_gap": 200}, {}, "--data.recall.max-gap 200, this run has 240"),
        (None, None, None),
        (None, {}, r"--data.recall None, this run has \{'keys': 16,"),
        ({}, None, r"--data.recall \{.*'keys': 16.*\}, this run has None"),
    ],
)
def test_another_recall_task_is_refused_wherever_the_checkpoint_has_it(
    tmp_path: Path, place: str, saved: dict[str, Any] | None, now: dict[str, Any] | None, refused: str | None
) -> None:
    """Once it stood in the model's section."""

    def task(changes: dict[str, Any] | None) -> RecallConfig | None:
        return None if changes is None else RecallConfig(**{"keys": 16, "values": 16, "fillers": 16, **changes})

    plain = to_plain(replace(miras_recall(), data__recall=task(saved)))
    plain[place]["recall"] = plain["data"].pop("recall")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    write_whole(tmp_path, {"format": 1, "system": "miras", "world": 1, "zero_stage": 1})
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_resumable(replace(miras_recall(), data__recall=task(now)), tmp_path)


def test_a_checkpoint_older_than_the_recall_task_had_none(tmp_path: Path) -> None:
    plain = to_plain(miras_tiny())
    del plain["data"]["recall"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    write_whole(tmp_path, {"format": 1, "system": "miras", "world": 2, "zero_stage": 3})
    check_resumable(miras_tiny(), tmp_path)


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
