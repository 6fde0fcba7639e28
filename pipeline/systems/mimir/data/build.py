"""From a run's configuration to the peptides that it trains on and holds out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from hashlib import blake2b

import numpy as np

from pipeline.config import RunConfig
from pipeline.errors import UserError, shown
from pipeline.files.given_path import expanded
from pipeline.parallel.topology import Topology
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.data import amp
from pipeline.systems.mimir.data.checks import Expected, check_table
from pipeline.systems.mimir.data.encode import encode, lengths_of
from pipeline.systems.mimir.data.loader import PeptideLoader
from pipeline.systems.mimir.data.split import HELD_OUT, HELD_OUT_TARGET, LEFT_OUT, TRAINING, split
from pipeline.systems.mimir.data.synthetic import synthetic_set
from pipeline.systems.mimir.data.table import NO_PEPTIDES, Table, read_tables, read_targets
from pipeline.systems.mimir.peptides import (
    BACKGROUND,
    INTERACTING,
    NO_TARGET,
    Peptides,
    PeptideSet,
    chosen,
    some,
)

SYNTHETIC = "synthetic"
"""The data set that is made when a run starts: SYNTHETIC, or SYNTHETIC:COUNT."""
LONGEST = 255
"""Residues of a peptide: its length is kept as one byte."""


def list_peptides(config: RunConfig) -> PeptideSet:
    """The peptides that `--data.path` or `--data.dataset` names, read, checked and split. Raises UserError."""
    assert isinstance(config.model, MimirConfig)
    model, data = config.model, config.data
    for flag, given in (("--data.mix", data.mix), ("--data.tokens", data.tokens), ("--data.recall", data.recall)):
        if given:
            raise UserError(f"{flag} is of text, and this system reads peptides: give --data.path")
    sequences: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    if data.path:
        if data.dataset:
            raise UserError("--data.path and --data.dataset are both given: leave one out")
        for name in data.path:
            if not expanded(name).exists():
                fix = f"give files of peptides with --data.path, or --data.dataset {SYNTHETIC}"
                raise UserError(f"{name} does not exist: {fix}")
        table = read_tables(data.path)
        notes = tuple(f"{name} ({NO_PEPTIDES})" for name in table.skipped)
    elif data.dataset == amp.NAME:
        table, notes = amp.amp_table(model.min_length, model.max_length)
    elif data.dataset is not None:
        table, sequences = synthetic_set(_synthetic_count(data.dataset), model)
    else:
        raise UserError(f"no peptides are named: give files with --data.path, or --data.dataset {SYNTHETIC}")
    if model.target == "encoder" and (sequences is None or model.target_file is not None):
        if model.target_file is None:
            raise UserError("--model.target encoder reads the targets' amino acids: name them with --model.target-file")
        sequences = read_targets(expanded(model.target_file))
    return build_set(table, model, data.holdout, sequences, notes)


def _synthetic_count(name: str) -> int:
    """Peptides of a data set SYNTHETIC or SYNTHETIC:COUNT. Raises UserError for another name."""
    kind, colon, count = name.partition(":")
    if kind != SYNTHETIC or (colon and not count.isdecimal()):
        names = f"{SYNTHETIC}, {SYNTHETIC}:COUNT or {amp.NAME}"
        raise UserError(f"--data.dataset {shown(name)}: give {names}, or name files with --data.path")
    return int(count) if colon else 20_000


def build_set(
    table: Table,
    model: MimirConfig,
    holdout: float,
    sequences: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> PeptideSet:
    """The rows of a table, checked and split. `sequences`: the targets' amino acids by name; `notes`: what was left out
    before. Raises UserError."""
    if model.max_length > LONGEST:
        raise UserError(f"--model.max-length {shown(model.max_length)}: peptides have {LONGEST} residues at most")
    needed = sequences if model.target == "encoder" else None
    check_table(table, Expected(model.letters, model.min_length, model.max_length, needed))
    dictionary = table.targets.dictionary_encode()
    names: list[str] = dictionary.dictionary.to_pylist()
    targets = dictionary.indices.to_numpy().astype(np.int32)
    if "" in names:
        targets[targets == names.index("")] = NO_TARGET
    labels = (np.array(table.labels.to_numpy(zero_copy_only=False)) == "1").astype(np.int8)
    divided = split(table.sequences, labels, targets, names, holdout)
    parts = divided.parts
    whole = Peptides(
        encode(table.sequences, model.letters, model.max_length),
        lengths_of(table.sequences).astype(np.uint8),
        labels,
        targets,
    )
    trained = np.unique(targets[(parts == TRAINING) & (targets >= 0)])
    others = np.setdiff1d(np.unique(targets[(parts != LEFT_OUT) & (targets >= 0)]), trained)
    order = [*sorted(trained.tolist(), key=names.__getitem__), *sorted(others.tolist(), key=names.__getitem__)]
    numbers = np.full(len(names) + 1, NO_TARGET, np.int32)
    numbers[order] = np.arange(len(order))
    whole = dataclasses.replace(whole, targets=numbers[whole.targets])
    training, held_out, held_out_targets = (
        chosen(whole, parts == part) for part in (TRAINING, HELD_OUT, HELD_OUT_TARGET)
    )
    target_names = tuple(names[place] for place in order)
    known = None
    if sequences is not None and sequences.keys() >= set(target_names):
        known = tuple(sequences[name] for name in target_names)
    if not len(training):
        raise UserError(f"{table.name}: no peptide is left to train on: give more, or a lower --data.holdout")
    notes += tuple(f"{count:,} {why}" for why, count in divided.left_out.items())
    found = PeptideSet(training, held_out, held_out_targets, target_names, len(trained), known, "", notes)
    return dataclasses.replace(found, fingerprint=_fingerprint(found))


def _fingerprint(found: PeptideSet) -> str:
    text = blake2b(digest_size=16)
    for part in (found.training, found.held_out, found.held_out_targets):
        for field in dataclasses.fields(Peptides):
            text.update(np.ascontiguousarray(getattr(part, field.name)).tobytes())
            text.update(b"\0")
    text.update("\0".join([*found.target_names, *(found.target_sequences or ())]).encode())
    return text.hexdigest()


def build_loader(
    config: RunConfig, topology: Topology, found: PeptideSet, *, held_out: bool = False, targets: bool = False
) -> PeptideLoader:
    """The loader of this data rank: of training, or of the peptides that are held out; with `targets`, of those of
    held-out targets.

    One epoch of held-out peptides is what an evaluation reads: the same ones whatever the seed and the layout.
    """
    assert isinstance(config.model, MimirConfig)
    rows = config.evaluation.batch_size if held_out else 0
    part = found.training
    if held_out:
        part = _evaluated(found.held_out_targets if targets else found.held_out, config.model)
    return PeptideLoader(
        part,
        name=("held-out targets" if targets else "held out") if held_out else "training",
        fingerprint=found.fingerprint,
        batch_size=rows or config.batch_size,
        grad_accum=1 if rows else config.grad_accum,
        data_rank=topology.data_rank,
        data_degree=topology.data,
        seed=0 if held_out else config.seed,
        shuffle=config.data.shuffle and not held_out,
        balanced=config.model.balanced and not held_out,
        domain="train" if not held_out else "held-out targets" if targets else "held out",
    )


def _evaluated(held_out: Peptides, model: MimirConfig) -> Peptides:
    """Those that an evaluation reads: at random, since files are often sorted; where training draws both labels equally
    often half of each, or all that there are of the rarer one."""
    left = model.held_out_peptides or len(held_out)
    if not model.balanced or len(held_out) <= left:
        return some(held_out, left)
    kinds = [np.flatnonzero(held_out.labels == label) for label in (BACKGROUND, INTERACTING)]
    generator, rows = np.random.Generator(np.random.PCG64(0)), []
    for number, kind in enumerate(sorted(kinds, key=len)):
        rows.append(generator.permutation(kind)[: left // (len(kinds) - number)])
        left -= len(rows[-1])
    return chosen(held_out, np.sort(np.concatenate(rows)))
