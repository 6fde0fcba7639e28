"""Whether a run can go on from a checkpoint, and in which phase: the same system, model and global batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.checkpoint.manifest import RESTORE, manifest_with, problems, read_manifest
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig
from pipeline.config_file import to_plain, with_moved_keys
from pipeline.errors import UserError, brief, shown
from pipeline.model_config import MAY_CHANGE
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import file_tensors
from pipeline.parallel.weights import full_shape
from pipeline.run import Progress
from pipeline.system import Phase


def check_resumable(config: RunConfig, checkpoint: Path) -> None:
    """Raises UserError when a run cannot go on from a checkpoint: another system, another model, or another task.

    It reads the manifest and the saved config alone, so it can be asked before anything is built.
    """
    read = read_config(checkpoint)
    system = manifest_with(checkpoint, "system")["system"]
    if system != config.model.system:
        raise UserError(
            f"{checkpoint} was saved with system {brief(system)}, this run has {config.model.system}: resume with its"
            " recipe"
        )
    saved, plain = with_moved_keys(read, str(checkpoint / "config.yaml")), to_plain(config)
    different = first_difference(saved["model"], config.model, plain["model"], "--model")
    if different is None:
        # Of documents the loader knows better what may change; a task is what the model is made for.
        task = saved.get("data", {}).get("recall")
        different = first_difference(task, config.data.recall, plain["data"]["recall"], "--data.recall")
    if different is not None:
        flag, before, now = different
        raise UserError(
            f"{checkpoint} was trained with {flag} {before}, this run has {now}: give the same, or take its weights,"
            " where their sizes are the same, with --init-from"
        )


def check_sizes(config: RunConfig, model: nn.Module, weights: Path) -> None:
    """Raises UserError where a checkpoint whose weights `--init-from` takes is of a run of another system, or where a
    tensor of it is of another size than the parameter of that name, with the field of the model that differs.

    `model` may be sharded, or without storage. Where nothing is known of the run that saved it, nothing is said: the
    tensors themselves are then refused, by their names.
    """
    path = weights / TRAINABLE
    if not path.is_file() or read_manifest(weights) is None:
        return
    sizes = {name: tuple(full_shape(parameter)) for name, parameter in model.named_parameters()}
    stored = file_tensors(path)
    other = next((name for name in stored if name in sizes and stored[name].shape != sizes[name]), None)
    if other is None:
        return
    saved = with_moved_keys(read_config(weights), str(weights / "config.yaml"))["model"]
    if saved.get("system") != config.model.system:
        raise UserError(
            f"--init-from {weights} was saved with system {brief(saved.get('system'))}, this run has"
            f" {config.model.system}: give a checkpoint of the same system"
        )
    different = first_difference(saved, config.model, to_plain(config)["model"], "--model")
    if different is not None:
        flag, before, now = different
        there, here = stored[other].shape, sizes[other]
        raise UserError(
            f"--init-from {weights} was trained with {flag} {before}, this run has {now}, and its {shown(other)} is"
            f" {there} in place of {here}: give {flag} {before}, or a checkpoint that was trained with {now}"
        )


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config of the run that saved a checkpoint, as plain values. Raises UserError when a byte of it differs."""
    import yaml

    wrong = problems(checkpoint, hashes=True, only=("config.yaml",))
    if wrong:
        raise UserError(f"{wrong[0]}: {RESTORE}")
    return yaml.safe_load((checkpoint / "config.yaml").read_text())


def first_difference(saved: Any, section: Any, plain: Any, flag: str) -> tuple[str, Any, Any] | None:
    """The first field in which a saved section, as plain values, is another model than `section`, whose are `plain`."""
    if not (isinstance(saved, dict) and dataclasses.is_dataclass(section)):
        return None if saved == plain else (flag, saved, plain)
    ignored = getattr(section, "ignored_fields", ())
    for field in dataclasses.fields(section):
        if field.name in ignored or MAY_CHANGE.items() <= field.metadata.items():
            continue
        value, before = getattr(section, field.name), saved.get(field.name)
        if field.name not in saved:
            # A run older than the field did what its default does.
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value == default:
                continue
            before = to_plain(default) if dataclasses.is_dataclass(default) else default
        words = f"{flag}.{field.name.replace('_', '-')}"
        found = first_difference(before, value, plain[field.name], words)
        if found is not None:
            return found
    return None


def keep_global_batch(config: RunConfig, topology: Topology, checkpoint: Path) -> RunConfig:
    """The config with as many micro-batches as keep the checkpoint's global batch on this layout. Raises UserError."""
    rows, whole = config.batch_size * topology.data, manifest_with(checkpoint, "global_batch")["global_batch"]
    if whole % rows:
        raise UserError(
            f"{checkpoint} was trained with {whole} sequences per step, and --batch-size {config.batch_size} on"
            f" {topology.data} data ranks makes steps of {rows}: choose a batch size that divides it"
        )
    return dataclasses.replace(config, grad_accum=whole // rows)


def phase_to_run(config: RunConfig, phases: Sequence[Phase], progress: Progress | None, where: str) -> int:
    """The index of the phase that a start trains: that of the checkpoint, whose progress is given, or the one after it.

    `where` names the checkpoint; without progress there is none. Raises UserError.
    """
    names = [phase.name for phase in phases]
    wanted = None if config.phase is None else names.index(config.phase)
    if progress is None:
        if wanted:
            raise UserError(
                f"--phase {config.phase}: it goes on from the checkpoint that ended {names[wanted - 1]}, and there is"
                f" none: name it with --resume PATH, or begin with it by --phases {config.phase}"
            )
        return 0
    index = names.index(progress.phase) if progress.phase in names else -1
    if index < 0 or list(progress.phases_before) != names[:index]:
        done = " ".join((*progress.phases_before, progress.phase))
        raise UserError(
            f"{where} is of a run of the phases {done}, this one has {' '.join(names)}: name the same with --phases, or"
            " take its weights alone with --init-from"
        )
    over = progress.phase_done or progress.phase_step >= phases[index].steps
    if wanted is None:
        return min(index + 1, len(phases) - 1) if over else index
    if wanted == index or (over and wanted == index + 1):
        return wanted
    state = f"ended {progress.phase}" if over else f"is inside {progress.phase}, at step {progress.phase_step} of it"
    fix = (
        f"--phase {config.phase} needs one that ended {names[wanted - 1]}" if wanted else f"{config.phase} is the first"
    )
    raise UserError(f"{where} {state}, and {fix}: name another with --resume PATH, or leave --phase out")
