"""A trained memory apart from its backbone: what there is to say of it, and how another run takes it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.compatibility import first_difference
from pipeline.checkpoint.frozen import frozen_weights
from pipeline.config_file import to_plain
from pipeline.errors import UserError, brief
from pipeline.files.given_path import expanded
from pipeline.lm.memory_folder import MemoryAlone, plain_settings, read_memory
from pipeline.lm.pretrained import pretrained_tensors
from pipeline.parallel.collectives import broadcast_object, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import load_safetensors
from pipeline.systems.miras.config import MemoryConfig, MirasConfig

MEMORY, BACKBONE = "memory.", "backbone."
SECTIONS = ("memory", "attention")
"""Sections of the model's config that decide what a memory computes."""


def memory_alone(model: nn.Module, config: MirasConfig, topology: Topology) -> MemoryAlone:
    """The memory of a whole model whose backbone was not trained; `config` as it is on that backbone."""
    backbone = config.backbone
    return MemoryAlone(
        system=config.system,
        settings=_settings(config),
        base={
            "name": backbone.pretrained,
            "revision": backbone.revision if backbone.pretrained is not None else None,
            "sha256": base_hash(model, config, topology),
        },
        names=frozenset(name for name, _ in model.named_parameters() if name.startswith(MEMORY)),
        flags=" ".join(_flags(config)),
    )


def attach(model: nn.Module, config: MirasConfig, topology: Topology, replaced: Collection[str] = ()) -> None:
    """Fills the memory of a model with that in the folder `config.memory.pretrained`, unless all of it is among
    `replaced`, as `System` has them. Collective.

    Raises UserError on every rank unless it is a memory of these settings, for a backbone with these weights.
    """
    assert config.memory.pretrained is not None
    names = [name for name, _ in model.named_parameters() if name.startswith(MEMORY)]
    if set(names) <= set(replaced):
        return
    folder = expanded(config.memory.pretrained)
    flag = f"--model.memory.pretrained {config.memory.pretrained}"
    with shared_errors(topology):
        if not folder.is_dir():
            raise UserError(f"{flag}: no such folder: give one as `mnemos export --memory-only` writes it")
        memory, _ = read_memory(folder)
        _check_settings(memory, config, flag)
        strange = sorted(memory.names.symmetric_difference(names))
        if strange:
            where = "there alone" if strange[0] in memory.names else "in this run alone"
            raise UserError(f"{flag}: {brief(strange[0])} is {where}: give the memory of a run with the same settings")
    own = base_hash(model, config, topology)
    with shared_errors(topology):
        if own != memory.base["sha256"]:
            base = brief(memory.base.get("name") or "random weights")
            raise UserError(
                f"{flag}: it was trained beside another backbone ({base}, whose hash is"
                f" {brief(memory.base['sha256'], 12)}): give that with --model.backbone.pretrained"
            )
    load_safetensors(model, lambda: read_memory(folder)[1], {name: name for name in names}, topology, what=flag)


def base_hash(model: nn.Module, config: MirasConfig, topology: Topology) -> str:
    """SHA-256 of the backbone's names, shapes and float32 values: of the files of a pretrained one, whatever precision
    a run computes in; of random ones as the model has them. Collective."""
    names = [name for name, _ in model.named_parameters()]
    if config.backbone.pretrained is None:
        found = frozen_weights(model, [name for name in names if not name.startswith(BACKBONE)], topology)
        return "" if found is None else str(found["sha256"])
    digest = hashlib.sha256()
    with shared_errors(topology):
        if topology.rank == 0:
            backbone: Any = model.backbone
            stored = pretrained_tensors(config.backbone, backbone.config)
            for name in sorted(name.removeprefix(BACKBONE) for name in names if name.startswith(BACKBONE)):
                value = stored[name].read(name).detach().to(torch.float32).contiguous()
                digest.update(f"{name} {tuple(value.shape)}\n".encode())
                digest.update(value.view(-1).numpy().data)
    return str(broadcast_object(topology, digest.hexdigest()))


def _settings(config: MirasConfig) -> dict[str, Any]:
    plain = plain_settings({name: to_plain(getattr(config, name)) for name in SECTIONS})
    # Where a memory came from is no part of what it computes.
    del plain["memory"]["pretrained"]
    return plain


def _check_settings(memory: MemoryAlone, config: MirasConfig, flag: str) -> None:
    if memory.system != config.system:
        raise UserError(f"{flag}: of the system {brief(memory.system)}: give a memory of {config.system}")
    own = _settings(config)
    for name in SECTIONS:
        saved = memory.settings.get(name)
        if not isinstance(saved, dict):
            raise UserError(f"{flag}: says nothing of its {name}: export it again")
        mine = {**own[name], **({"pretrained": None} if name == "memory" else {})}
        different = first_difference(saved, getattr(config, name), mine, f"--model.{name}")
        if different is not None:
            field, before, now = different
            raise UserError(f"{flag}: it was trained with {field} {before}, this run has {now}: give the same")


def _flags(config: MirasConfig) -> Iterator[str]:
    """The flags that differ from a memory's defaults, as words of a command."""
    if config.backbone.pretrained is not None:
        yield f"--model.backbone.pretrained {config.backbone.pretrained}"
    memory = dataclasses.replace(config.memory, pretrained=None)
    defaults = MirasConfig()
    for name, section in (("memory", memory), ("attention", config.attention)):
        ignored = memory.ignored_fields if name == "memory" else set()
        default = MemoryConfig() if name == "memory" else defaults.attention
        yield from _different(to_plain(section), to_plain(default), f"--model.{name}", ignored)


def _different(values: Mapping[str, Any], defaults: Mapping[str, Any], flag: str, ignored: set[str]) -> Iterator[str]:
    for key, value in values.items():
        name = f"{flag}.{key.replace('_', '-')}"
        if key in ignored or value == defaults[key]:
            continue
        if isinstance(value, dict):
            yield from _different(value, defaults[key], name, set())
        elif isinstance(value, bool):
            yield name if value else f"{flag}.no-{key.replace('_', '-')}"
        else:
            yield f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
