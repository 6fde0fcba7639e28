"""A memory alone: written beside the name and hash of its backbone, and attached to that backbone and no other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig, replace
from pipeline.engine import building
from pipeline.errors import UserError
from pipeline.export.command import run_export
from pipeline.inference.trained import load_trained, read_run
from pipeline.lm.memory_folder import SETTINGS, WEIGHTS
from pipeline.load import load_model
from pipeline.parallel.topology import Topology
from pipeline.system import create_system
from tests.export.small_checkpoints import built, save, with_memory
from tests.lm.small_olmo import save_olmo


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, torch.nn.Module]:
    """A folder with a memory, the run that trained it, and the run's model."""
    root = tmp_path_factory.mktemp("memory")
    config = with_memory(pretrained=str(save_olmo(root / "base")))
    system, model = built(config)
    save(root / "run", config, system, model)
    run_export([str(root / "run"), str(root / "out"), "--memory-only"])
    return root / "out", config, model


def with_settings(config: RunConfig, section: str = "memory", **changes: Any) -> RunConfig:
    model: Any = config.model
    changed = dataclasses.replace(getattr(model, section), **changes)
    return replace(config, model=dataclasses.replace(model, **{section: changed}))


def initialised(config: RunConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    system = create_system(config)
    with building({}, dtype):
        model = system.build()
    system.initialise(model, Topology())
    return model


def test_the_folder_has_the_memory_and_names_its_backbone(written: tuple[Path, RunConfig, torch.nn.Module]) -> None:
    folder, config, model = written
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", SETTINGS, WEIGHTS]
    card = (folder / "README.md").read_text()
    assert "library_name" not in card and "pipeline_tag" not in card
    weights = load_file(folder / WEIGHTS)
    trained = {name: value for name, value in model.state_dict().items() if name.startswith("memory.")}
    assert weights.keys() == trained.keys() and all(
        torch.equal(value, trained[name]) for name, value in weights.items()
    )
    content = json.loads((folder / SETTINGS).read_text())
    assert content["base"]["name"] == config.model.backbone.pretrained and len(content["base"]["sha256"]) == 64  # type: ignore[attr-defined]


def test_it_is_attached_to_its_backbone_in_any_precision(written: tuple[Path, RunConfig, torch.nn.Module]) -> None:
    folder, config, model = written
    again = initialised(with_settings(config, pretrained=str(folder)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    half = initialised(with_settings(config, pretrained=str(folder)), torch.bfloat16)
    assert all(torch.equal(value, model.state_dict()[name].bfloat16()) for name, value in half.state_dict().items())


def test_the_flags_of_the_card_are_those_of_a_run_with_it(written: tuple[Path, RunConfig, torch.nn.Module]) -> None:
    folder, config, _ = written
    (line,) = (
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("mnemos train RECIPE")
    )
    words = line.replace(" out", f" {folder}").split()[2:]
    words[0] = "miras_64k"
    parsed = parse_run(words, "train")
    memory: Any = with_settings(config, pretrained=str(folder)).model.memory  # type: ignore[attr-defined]
    # Of mac alone.
    assert parsed.model.memory == dataclasses.replace(memory, context=parsed.model.memory.context)  # type: ignore[attr-defined]
    assert parsed.model.attention == config.model.attention  # type: ignore[attr-defined]


def test_another_backbone_or_another_memory_is_refused(
    written: tuple[Path, RunConfig, torch.nn.Module], tmp_path: Path
) -> None:
    folder, config, _ = written
    config = with_settings(config, pretrained=str(folder))
    other = with_settings(config, "backbone", pretrained=str(save_olmo(tmp_path / "other")))
    cases = {
        "trained beside another backbone": other,
        "was trained with --model.memory.head-dim 8, this run has 16: give the same": with_settings(
            config, head_dim=16
        ),
        "was trained with --model.attention.window 16, this run has 8": with_settings(config, "attention", window=8),
        "no such folder": with_settings(config, pretrained=str(tmp_path / "absent")),
        f"holds no {SETTINGS}": with_settings(config, pretrained=str(tmp_path)),
    }
    for said, run in cases.items():
        with pytest.raises(UserError, match=said):
            initialised(run)


@pytest.mark.parametrize("text, said", [("{", "not JSON"), ('{"version": 9}', "not that of a memory of this version"),
                                        ('{"version": 1, "base": {}, "settings": {}}', "names no base")])  # fmt: skip
def test_a_damaged_folder_is_refused(
    written: tuple[Path, RunConfig, torch.nn.Module], tmp_path: Path, text: str, said: str
) -> None:
    folder, config, _ = written
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / SETTINGS).write_text(text)
    with pytest.raises(UserError, match=said):
        initialised(with_settings(config, pretrained=str(tmp_path / "copy")))


def test_the_folder_is_not_needed_where_a_checkpoint_has_the_memory(
    written: tuple[Path, RunConfig, torch.nn.Module], tmp_path: Path
) -> None:
    """Of a run that began from it: to export, to evaluate, and to go on."""
    folder, config, _ = written
    began = with_settings(config, pretrained=str(shutil.copytree(folder, tmp_path / "memory")))
    system, model = built(began)
    whole = save(tmp_path / "run", began, system, model)
    one = next(name for name, _ in model.named_parameters() if name.startswith("memory."))
    part = save(tmp_path / "part", began, system, model, without=one)
    shutil.rmtree(tmp_path / "memory")
    again = read_run(whole)
    assert again == replace(began, output_dir=again.output_dir)
    loaded = load_trained(whole, again, create_system(again)).model
    evaluated = load_model(again, create_system(again), Topology(), weights=whole).model
    for found in (loaded, evaluated):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    load_model(again, create_system(again), Topology(), checkpoint=whole)
    assert load_file(part / TRAINABLE).keys() == load_file(whole / TRAINABLE).keys() - {one}
    for weights in (None, part):
        with pytest.raises(UserError, match=r"--model\.memory\.pretrained .*memory: no such folder"):
            load_model(again, create_system(again), Topology(), weights=weights)
