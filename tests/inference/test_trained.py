"""Every weight of an exported model is accounted for: trained, or confirmed by its hash."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.inference.trained import Trained, find, load_trained, read_run
from pipeline.system import create_system
from tests.export.small_checkpoints import STEP, built, checkpoint_of, dense, save, with_memory
from tests.lm.small_olmo import save_olmo


def loaded(checkpoint: Path, **changes: Any) -> Trained:
    config = read_run(checkpoint, **changes)
    return load_trained(checkpoint, config, create_system(config))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_was_trained_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    system, model = built(dense(), dtype)
    trained = loaded(save(tmp_path, dense(), system, model))
    assert same(trained.model, model) and next(trained.model.parameters()).dtype == dtype
    assert set(trained.trained) == {name for name, _ in model.named_parameters()} and not trained.model.training


def test_a_run_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, dense())
    assert find(tmp_path) == find(checkpoint) == checkpoint


def test_weights_that_were_not_trained_are_those_of_the_start(tmp_path: Path) -> None:
    system, model = built(with_memory())
    trained = loaded(save(tmp_path, with_memory(), system, model))
    assert same(trained.model, model)
    assert all(name.startswith("memory.") for name in trained.trained)


def on(folder: Path) -> RunConfig:
    config = with_memory(pretrained=str(folder))
    return replace(config, data__tokenizer="bytes")


def test_a_frozen_backbone_may_have_moved_and_must_be_the_same(tmp_path: Path) -> None:
    base = save_olmo(tmp_path / "base")
    config = on(base)
    config = replace(config, model=dataclasses.replace(config.model, attention=with_memory().model.attention))  # type: ignore[attr-defined, call-arg]
    system, model = built(config)
    checkpoint = save(tmp_path / "run", config, system, model)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match="base"):
        loaded(checkpoint)
    assert same(loaded(checkpoint, pretrained=str(tmp_path / "moved")).model, model)
    other = save_olmo(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"was trained on other frozen weights than .*other.*--model.backbone.pretrained"
    ):
        loaded(checkpoint, pretrained=str(other))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, said in ((tmp_path / "absent", "no such folder"), (tmp_path, "holds no complete checkpoint"),
                       (tmp_path / "run", "holds no complete checkpoint")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            find(path)


def test_weights_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "part", dense(), without="layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"lacks 1 of the weights that were trained, such as .*1\.mlp\.up_proj\.weight"):
        loaded(checkpoint)
    content = bytearray((checkpoint / TRAINABLE).read_bytes())
    content[-1] ^= 1
    (checkpoint / TRAINABLE).write_bytes(content)
    with pytest.raises(UserError, match=f"{TRAINABLE}: content differs from its hash"):
        read_run(checkpoint)
    (checkpoint / TRAINABLE).unlink()
    with pytest.raises(UserError, match=f"{TRAINABLE}: missing"):
        read_run(checkpoint)


def test_a_place_of_pretrained_weights_is_for_runs_that_have_some(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, dense())
    with pytest.raises(UserError, match=r"--model\.backbone\.pretrained here: olmo_tiny was not trained"):
        read_run(checkpoint, pretrained="here")
    assert checkpoint.name == f"checkpoint-{STEP}"
