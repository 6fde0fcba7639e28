"""Whether a run was trained as another one, but without context: what makes it the other's control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import CHECKSUM, manifest_with, pointed, read_manifest
from pipeline.checkpoint.restore import read_progress
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig
from pipeline.errors import UserError, shown
from pipeline.files.given_path import expanded
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.phase import FIXED_POINT, PREDICTION

ALIKE = (
    "sequence_length", "seed", "steps", "epochs.train", "lr", "warmup_steps", "weight_decay", "clip", "optimizer",
    "precision",
)  # fmt: skip
"""Settings of a run that decide how a model is trained, and for how long."""
ALIKE_MODEL = (
    "carry", "width", "layers", "decay", "layernorm_mix", "initial_std", "as_published", "embedding",
    "train_embedding", "fixed_point", "prediction.freeze_context",
)  # fmt: skip
DERIVED = ("steps",)
"""Of a section: what the data decides."""


def check_alike(config: RunConfig, checkpoint: Path, other: RunConfig, control: Path) -> None:
    """Raises UserError where the run of a `control`, of config `other`, was not trained as that of `checkpoint`: on the
    same documents in the same order, as many of them in an update, from the same weights, but without context.

    Data and rows of an update are what the checkpoints say was read, whatever flags and ranks it took.
    """
    what = f"--control {control}"
    if not isinstance(other.model, CvfpConfig):
        raise UserError(f"{what}: is a run of {other.recipe}: give one of {config.recipe}")
    if other.model.prediction.context != "zero":
        raise UserError(f"{what}: was trained with its contexts: give a run with --model.prediction.context zero")
    for one, name in ((checkpoint, "this checkpoint"), (control, "it")):
        if read_progress(one).phase != PREDICTION:
            raise UserError(f"{what}: {name} is of phase {FIXED_POINT}, which predicts no token: give later ones")
    for says, mine, theirs in (
        *_of_data(*(manifest_with(one, "global_batch", "data_fingerprint") for one in (checkpoint, control))),
        *_of_settings(config, other),
        *_of_weights(config, checkpoint, other),
    ):
        if mine != theirs:
            raise UserError(
                f"{what}: has {says} {shown(theirs)}, where this run has {shown(mine)}: give a run that was trained"
                f" alike but for --model.prediction.context zero"
            )


Compared = Iterator[tuple[str, Any, Any]]
"""What it is, and both values."""


def _of_data(mine: dict[str, Any], theirs: dict[str, Any]) -> Compared:
    """Of both manifests: what was read, in which order, and how much of it in an update."""
    first, second = (manifest["data_fingerprint"] for manifest in (mine, theirs))
    if first["source"]["digest"] != second["source"]["digest"]:
        yield "other documents:", _said(first["source"]), _said(second["source"])
    yield "--data.shuffle", first["shuffle"], second["shuffle"]
    yield "rows of an update (--batch-size x --grad-accum x data ranks)", mine["global_batch"], theirs["global_batch"]


def _said(source: dict[str, Any]) -> str:
    return f"{source['documents']}, {source['tokens']:,} tokens, {source['digest'][:8]}"


def _of_settings(config: RunConfig, other: RunConfig) -> Compared:
    """Each setting in which they have to agree, by its flag; of sections field by field."""
    for name in (*ALIKE, *(f"model.{name}" for name in ALIKE_MODEL)):
        mine, theirs = (attrgetter(name)(one) for one in (config, other))
        if is_dataclass(mine):
            for part in fields(mine):
                if part.name not in DERIVED:
                    flag = f"--{name}.{part.name}".replace("_", "-")
                    yield flag, getattr(mine, part.name), getattr(theirs, part.name)
        else:
            yield f"--{name}".replace("_", "-"), mine, theirs


def _of_weights(config: RunConfig, checkpoint: Path, other: RunConfig) -> Compared:
    """The phases, and the weights that they began with. A control may also have the second phase alone, from where the
    first one of this very run ended."""
    mine, theirs = (_phases(one) for one in (config, other))
    if theirs == (PREDICTION,) and mine != theirs and other.init_from is not None:
        place = _place(other.init_from)
        if place.parent == checkpoint.resolve().parent and (place / TRAINABLE).is_file():
            progress = read_progress(place)
            if progress.phase == FIXED_POINT and progress.phase_done:
                return
    yield "--phases", " ".join(mine), " ".join(theirs)
    if not _same_weights(config.init_from, other.init_from):
        yield "--init-from", _named(config.init_from), _named(other.init_from)


def _phases(config: RunConfig) -> tuple[str, ...]:
    """By their names, whether they were all named or none."""
    return (config.phase,) if config.phase is not None else config.phases or (FIXED_POINT, PREDICTION)


def _named(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _place(path: Path) -> Path:
    return pointed(expanded(path)).resolve()


def _same_weights(mine: Path | None, theirs: Path | None) -> bool:
    """Whether two values of --init-from are one place, however it is written, or hold the same weights."""
    if mine is None or theirs is None:
        return mine is theirs
    places = [_place(path) for path in (mine, theirs)]
    hashes = [((read_manifest(place) or {}).get("files", {}).get(TRAINABLE) or {}).get(CHECKSUM) for place in places]
    return places[0] == places[1] or (hashes[0] is not None and hashes[0] == hashes[1])
