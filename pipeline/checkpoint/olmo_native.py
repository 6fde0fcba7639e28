"""A checkpoint of this program as a native folder of OLMo, and a native folder as a checkpoint.

What goes over: weights, AdamW's moments with their updates, step, tokens, and the random states where OLMo would take
them. The position in the data does not: OLMo's order of windows is another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.checkpoint.files import Entry, check_new, checksum, new_folder, write_shard, write_tensors
from pipeline.checkpoint.loader_state import read_loader_state
from pipeline.checkpoint.manifest import manifest_with, problems, write_manifest
from pipeline.checkpoint.parameters import Parameters
from pipeline.checkpoint.restore import TRAINER_STATE
from pipeline.checkpoint.safe import load_pickle
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.checkpoint.universal_convert import (
    COUNTERS,
    FORMAT,
    LOSS_SCALE,
    MASTER,
    MODEL_STATES,
    OPTIMIZER_STATE,
    PARAMETERS,
    STEP,
    VERSION,
)
from pipeline.config import RunConfig
from pipeline.config_file import save_config
from pipeline.errors import UserError, shown
from pipeline.host.versions import versions
from pipeline.lm.olmo_config import check_layout
from pipeline.lm.olmo_folder import CONFIG, MODEL, OPTIMIZER, TRAINER, check_native, read_trainer, read_weights
from pipeline.lm.olmo_layout import fused, has_layout, layout
from pipeline.lm.olmo_optimizer import MOMENTS, AdamSettings, AdamState, optimizer_content, read_optimizer
from pipeline.run import Progress


@dataclass(frozen=True)
class Decoder:
    """The decoder that is the whole of a model, and what stands before transformers' names in its parameters'."""

    config: PreTrainedConfig
    prefix: str


def write_native(checkpoint: Path, parent: Path, decoder: Decoder, run: RunConfig, content: Mapping[str, Any]) -> Path:
    """Writes a complete checkpoint of `run` as parent/step{N}-unsharded, and returns it; `content` is its config.yaml.

    Raises UserError, with nothing left behind, for what has no such layout.
    """
    if not has_layout(decoder.config):
        raise UserError(
            f"{checkpoint}: its decoder is of the type {decoder.config.model_type}: only OLMo and OLMo 2 without biases"
            " have this layout"
        )
    check_layout(decoder.config, str(checkpoint))
    manifest = manifest_with(checkpoint, "step", "global_batch")
    out = parent / f"step{manifest['step']}-unsharded"
    check_new(out)
    wrong = problems(checkpoint, hashes=True)
    if wrong:
        raise UserError(wrong[0])
    source = Parameters(checkpoint)
    # As OLMo's own trainer names what is not complete.
    with new_folder(out, out.with_name(f"{out.name}-tmp")) as partial:
        weights = {_plain(saved.name, decoder): saved.tensors[MASTER] for saved in source.read(moments=False)}
        _check_whole(weights, decoder, checkpoint)
        write_shard(fused(weights, decoder.config), partial / MODEL)
        del weights
        state = _adam(source, decoder, run)
        write_shard(optimizer_content(state, decoder.config, str(checkpoint)), partial / OPTIMIZER)
        del state
        write_shard(_trainer_content(checkpoint, manifest, run), partial / TRAINER)
        (partial / CONFIG).write_text(yaml.safe_dump(dict(content), sort_keys=False))
        checksum(partial / CONFIG)
    return out


def _plain(name: str, decoder: Decoder) -> str:
    return name.removeprefix(decoder.prefix)


def _check_whole(weights: Mapping[str, Tensor], decoder: Decoder, checkpoint: Path) -> None:
    wanted = {part for parts in layout(decoder.config).values() for part in parts}
    odd = sorted(wanted.symmetric_difference(weights))
    if odd:
        what = "was not trained" if odd[0] in wanted else "is no part of the decoder"
        raise UserError(f"{checkpoint}: {shown(odd[0])} {what}: only a decoder that is trained whole has this layout")


def _adam(source: Parameters, decoder: Decoder, run: RunConfig) -> AdamState:
    moments: dict[str, dict[str, Tensor]] = {kind: {} for kind in MOMENTS}
    steps: dict[str, float] = {}
    decay: dict[str, float] = {}
    groups = source.groups()
    for group in groups:
        decay |= {_plain(name, decoder): float(group["weight_decay"]) for name in group["parameters"]}
    for saved in source.read():
        name = _plain(saved.name, decoder)
        steps[name] = saved.step
        for kind in MOMENTS:
            moments[kind][name] = saved.tensors[kind]
    # A checkpoint that came without an optimizer has none of them.
    first: dict[str, Any] = {"lr": run.lr, "betas": run.optimizer.betas, "eps": run.optimizer.eps, **groups[0]}
    betas = (float(first["betas"][0]), float(first["betas"][1]))
    settings = AdamSettings(float(first["lr"]), run.lr, betas, float(first["eps"]), run.clip or None)
    return AdamState(moments, steps, decay, settings)


def _trainer_content(checkpoint: Path, manifest: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    step, rows = int(manifest["step"]), int(manifest["global_batch"])
    epoch, examples = divmod(step * rows, _examples_per_epoch(checkpoint) or step * rows + 1)
    content: dict[str, Any] = {
        "epoch": epoch,
        "global_step": step,
        "global_train_examples_seen_this_epoch": examples,
        "global_train_tokens_seen": step * rows * run.sequence_length,
        "world_size": int(manifest["world"]),
        "checkpoints": [],
        "unsharded_checkpoints": [],
        "ephemeral_checkpoints": [],
    }
    states = checkpoint / "rng-00000.pt"
    saved: dict[str, Any] = load_pickle(states) if states.is_file() else {"cuda": None}
    # OLMo takes all four, or without an entry none.
    if saved["cuda"] is not None:
        name, keys, *rest = saved["numpy"]
        content["rng"] = {**saved, "numpy": (name, keys.numpy().astype(np.uint32), *rest)}
    return content


def _examples_per_epoch(checkpoint: Path) -> int | None:
    """Windows of the token files that a run is trained on; None where it reads documents, or has read nothing here."""
    windows = read_loader_state(checkpoint).get("windows_per_epoch")
    return None if windows is None else sum(windows)


def read_native(folder: Path, out: Path, decoder: Decoder, run: RunConfig, phase: str) -> list[str]:
    """Writes a native folder to the new folder `out` as a checkpoint of `run` in the universal format, at the step
    that it holds; returns what it lacks, as sentences. `phase` is the one that a run of it trains.

    Raises UserError, with nothing left behind, for what is damaged or of another model.
    """
    check_new(out)
    check_native(folder)
    weights = read_weights(folder, decoder.config)
    state, trainer = read_optimizer(folder, decoder.config), read_trainer(folder)
    rows = run.batch_size * run.grad_accum
    lacks = [] if state is not None else [f"no {OPTIMIZER}: its moments are zero"]
    step = _count(trainer, "global_step", folder)
    if step is None:
        lacks.append(f"no step in {TRAINER}: it is at step 0")
        step = 0
    tokens = _count(trainer, "global_train_tokens_seen", folder)
    tokens = step * rows * run.sequence_length if tokens is None else tokens
    # OLMo counts inputs; a window of T tokens has T - 1 labels.
    progress = Progress(step=step, phase=phase, tokens=tokens - tokens // run.sequence_length)
    facts = {
        "step": step, "recipe": run.recipe, "system": run.model.system, "world": 0, "data": 0, "sequence": 0,
        "zero_stage": 0, "global_batch": rows, "frozen": None, "versions": versions(), "data_fingerprint": None,
        "format": FORMAT,
    }  # fmt: skip
    with new_folder(out) as partial:
        files = _write_parameters(partial, weights, state, decoder, step, rows)
        named = {decoder.prefix + name: value.float().contiguous() for name, value in weights.items()}
        files[TRAINABLE] = write_tensors(named, partial / TRAINABLE)
        (partial / TRAINER_STATE).write_text(json.dumps(dataclasses.asdict(progress), indent=1) + "\n")
        save_config(run, partial / CONFIG)
        files |= {name: checksum(partial / name) for name in (TRAINER_STATE, CONFIG)}
        write_manifest(partial, facts, files)
    return lacks


def _write_parameters(
    folder: Path, weights: Mapping[str, Tensor], state: AdamState | None, decoder: Decoder, step: int, rows: int
) -> dict[str, Entry]:
    """DeepSpeed's part of a checkpoint in the universal format."""
    files: dict[str, Entry] = {}

    def write(name: str, content: Any) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files[name] = write_shard(content, path)

    for name, weight in weights.items():
        place = f"{PARAMETERS}/{decoder.prefix}{name}"
        updates = 0.0 if state is None else state.steps[name]
        write(f"{place}/{MASTER}.pt", {"cat_dim": 0, "param": weight.float().clone()})
        for kind in MOMENTS:
            moment = torch.zeros_like(weight) if state is None or not updates else state.moments[kind][name]
            write(f"{place}/{kind}.pt", {"cat_dim": 0, "param": moment.float().clone()})
        write(f"{place}/{STEP}.pt", torch.tensor(updates))
    groups: dict[float, list[str]] = {}
    for name in weights:
        groups.setdefault(0.0 if state is None else state.decay[name], []).append(decoder.prefix + name)
    shared = {} if state is None else {key: getattr(state.settings, key) for key in ("lr", "betas", "eps")}
    plain = [{**shared, "weight_decay": decay, "parameters": names} for decay, names in groups.items()]
    deepspeed = versions()["deepspeed"]
    write(f"{PARAMETERS}/{OPTIMIZER_STATE}", {"param_groups": plain, "zero_stage": 0, "ds_version": deepspeed})
    counters = dict(zip(COUNTERS, (step, step * rows, 0), strict=True))
    shapes = {decoder.prefix + name: tuple(weight.shape) for name, weight in weights.items()}
    write(
        MODEL_STATES,
        {
            "module": {}, "buffer_names": [], **counters, "dp_world_size": 1, "mp_world_size": 1,
            "ds_version": deepspeed, LOSS_SCALE: None, "param_shapes": [shapes],
            "universal_checkpoint_info": {"universal_checkpoint_version": VERSION},
        },
    )  # fmt: skip
    return files


def _count(trainer: Mapping[str, Any], key: str, folder: Path) -> int | None:
    value = trainer.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise UserError(f"{folder / TRAINER}: {key} is {shown(value)}: take a checkpoint with a whole number there")
    return value
