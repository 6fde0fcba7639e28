"""Initial weights are those of the model's own files, refused where they are not whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import pretrained_tensors
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_tiny
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MirasConfig
from tests.lm.small_olmo import save_olmo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_olmo(tmp_path / "olmo")


def run_of(folder: Path) -> RunConfig:
    config = miras_tiny()
    assert isinstance(config.model, MirasConfig)
    changed = dataclasses.replace(config.model.backbone, pretrained=str(folder))
    return replace(config, model=dataclasses.replace(config.model, backbone=changed), parallel__sequence=1)


def test_an_older_save_in_the_folder_changes_no_weight(folder: Path) -> None:
    """Once the last name won, in silence: token losses were up to 5.6 nats off."""
    expected = {
        name: load_file(stored.file)[name]
        for name, stored in pretrained_tensors(BackboneConfig(pretrained=str(folder))).items()
    }
    save_file({name: torch.full_like(value, 7.0) for name, value in expected.items()}, folder / "older.safetensors")
    system = create(run_of(folder))
    model = system.build()
    system.initialise(model, Topology())
    found = {name.removeprefix("backbone."): value for name, value in model.named_parameters()}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_weights_that_are_not_whole_are_refused_before_a_rank_starts(folder: Path) -> None:
    system = create(run_of(folder))
    system.check(Topology())
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{shard.name}: cannot be read"):
        system.check(Topology())


def test_sizes_of_another_model_are_named_with_the_file(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "intermediate_size": 32}))
    system = create(run_of(folder))
    model = system.build()
    with pytest.raises(UserError, match=r"--model.backbone.pretrained .*mlp.* in model-.*\.safetensors is \(24, 16\)"):
        system.initialise(model, Topology())
