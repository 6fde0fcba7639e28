"""The model of a checkpoint, whole in this process, with every weight accounted for; no data is looked at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.frozen import frozen_weights
from pipeline.checkpoint.manifest import MANIFEST, manifest_with, newest, pointed, problems
from pipeline.checkpoint.trainable import TRAINABLE, load_average, load_trainable
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.engine import building
from pipeline.errors import UserError
from pipeline.lm.memory_folder import SETTINGS
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import file_tensors
from pipeline.recipes import all_recipes
from pipeline.system import System

GIVE = "give the folder of a checkpoint, or a run directory for its newest one"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on the CPU, in the precision that it was trained in, and where it comes from."""

    checkpoint: Path
    config: RunConfig
    manifest: dict[str, Any]
    system: System[Any]
    model: nn.Module
    trained: tuple[str, ...]
    """Parameters that the run trained."""


def find(path: Path, fix: str = GIVE) -> Path:
    """The checkpoint that a path means. Raises UserError, with the fix, where there is none."""
    path = pointed(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: {fix}")
    other, none = "give {path}", "give another checkpoint"
    found = newest(path / "checkpoints", other, none) if (path / "checkpoints").is_dir() else path
    if found is None or not (found / MANIFEST).is_file():
        raise UserError(f"{path}: {no_checkpoint(path, fix)}")
    return found


def no_checkpoint(folder: Path, fix: str = GIVE) -> str:
    """What is wrong with a folder without a manifest, and the fix."""
    if (folder / SETTINGS).is_file():
        return f"a memory alone, which --model.memory.pretrained attaches to its backbone: {fix}"
    return f"holds no complete checkpoint: {fix}"


def read_run(checkpoint: Path, *, tokenizer: str | None = None, pretrained: str | None = None) -> RunConfig:
    """The config of the run that saved a checkpoint, whose config and weights are whole. `tokenizer`, `pretrained`:
    where the tokenizer and the pretrained backbone are now. Raises UserError."""
    config = read_config(checkpoint, TRAINABLE)
    if tokenizer is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    if pretrained is not None:
        backbone = getattr(config.model, "backbone", None)
        if getattr(backbone, "pretrained", None) is None:
            raise UserError(
                f"--model.backbone.pretrained {pretrained}: {config.recipe} was not trained from pretrained weights:"
                " leave it out"
            )
        assert backbone is not None
        changed: Any = {"backbone": dataclasses.replace(backbone, pretrained=pretrained)}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changed))
    return config


def read_config(checkpoint: Path, *others: str) -> RunConfig:
    """The config of the run that saved a checkpoint; it is whole, and so are the files `others`. Raises UserError."""
    names = ("config.yaml", *others)
    wrong = problems(checkpoint, hashes=True, only=names)
    if wrong:
        raise UserError(f"{wrong[0]}: restore the file, or give another checkpoint")
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint}: holds no {name}: give another checkpoint")
    return load_config(checkpoint / "config.yaml", all_recipes())


def load_trained(checkpoint: Path, config: RunConfig, system: System[Any], *, raw: bool = False) -> Trained:
    """Builds the model of a run and fills all of it: what was trained from the checkpoint (the moving average that it
    has, unless `raw`), what was not as at the start of the run, which its hash has to confirm. Raises UserError where a
    weight is missing or is another one."""
    stored = file_tensors(checkpoint / TRAINABLE)
    kinds = {tensor.dtype for tensor in stored.values() if tensor.dtype in DTYPES}
    if not kinds:
        raise UserError(f"{checkpoint / TRAINABLE}: holds no weights: give another checkpoint")
    topology = Topology()
    with building({}, DTYPES[min(kinds)]):
        model = system.build()
    names = [name for name, _ in model.named_parameters()]
    trained = {name for phase in system.phases(model) for group in phase.groups for name in group.parameters}
    missing = sorted(name for name in names if name in trained and name not in stored)
    if missing:
        raise UserError(
            f"{checkpoint / TRAINABLE} lacks {len(missing)} of the weights that were trained, such as {missing[0]}:"
            " give another checkpoint"
        )
    frozen = [name for name in names if name not in stored]
    if frozen:
        system.replaced = frozenset(stored)
        system.initialise(model, topology)
    load_trainable(model, checkpoint, topology)
    manifest = manifest_with(checkpoint, "step", "frozen")
    if frozen and manifest["frozen"] != frozen_weights(model, set(stored), topology):
        raise UserError(
            f"{checkpoint}: was trained on other frozen weights than {_base(config)}: give those with"
            " --model.backbone.pretrained FOLDER"
        )
    if not raw:
        load_average(model, checkpoint, topology)
    return Trained(checkpoint, config, manifest, system, model.eval(), tuple(name for name in names if name in trained))


def _base(config: RunConfig) -> str:
    pretrained = getattr(getattr(config.model, "backbone", None), "pretrained", None)
    return str(pretrained or "the random ones of its seed")
