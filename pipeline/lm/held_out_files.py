"""Held-out files by name, evaluated in training: `--evaluation.path NAME=PATH` and `--evaluation.tokens NAME=FILE`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, StatefulLoader, TokenBatch
from pipeline.data.build import Listings, build_loader
from pipeline.data.sources.listing import list_files
from pipeline.data.tokens.listing import TokenListing, list_tokens
from pipeline.errors import UserError
from pipeline.lm.held_out import Evaluated, run_loader
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation


class EvaluatedByFile(Evaluated, Protocol):
    """What the evaluation of named files needs of a system besides."""

    def file_loaders(self, topology: Topology) -> Mapping[str, StatefulLoader[TokenBatch]]:
        """By name, each at its start."""
        ...


@dataclass(frozen=True)
class NamedFiles:
    """A set of held-out files."""

    flag: str
    """Its flag and name, for messages."""
    place: str
    config: RunConfig
    """That of a run on these files."""

    def listed(self) -> Listings:
        """Raises UserError."""
        if self.config.data.tokens:
            found = list_tokens((self.place,), self.flag)
            return TokenListing(found, found)
        return (list_files((self.place,), self.config.output_dir, flag=self.flag),)


def named_files(config: RunConfig) -> dict[str, NamedFiles]:
    """The sets of held-out files by name. Raises UserError."""
    found: dict[str, NamedFiles] = {}
    data = dataclasses.replace(config.data, path=(), dataset=None, mix=(), tokens=(), held_out_tokens=(), recall=None)
    own = {
        "path": lambda place: dataclasses.replace(data, path=(place,)),
        # Token files of their own are read whole, not by the share that is held out.
        "tokens": lambda place: dataclasses.replace(data, tokens=(place,), held_out_tokens=(place,)),
    }
    for kind, entries in (("path", config.evaluation.path), ("tokens", config.evaluation.tokens)):
        flag = f"--evaluation.{kind}"
        for name, place in _named(flag, entries):
            if name in found:
                raise UserError(f"{flag} {name}={place}: {name} is given twice: give each a name of its own")
            found[name] = NamedFiles(f"{flag} {name}:", place, dataclasses.replace(config, data=own[kind](place)))
    return found


def _named(flag: str, entries: Sequence[str]) -> list[tuple[str, str]]:
    split = [entry.partition("=") for entry in entries]
    for entry, (name, _, place) in zip(entries, split, strict=True):
        if not (name and place) or "/" in name:
            raise UserError(f"{flag} {entry}: give NAME=FILE, such as books=/data/books.jsonl")
    return [(name, place) for name, _, place in split]


def open_files(config: RunConfig, topology: Topology, vocab_size: int) -> dict[str, StatefulLoader[TokenBatch]]:
    """A loader of all that each set of held-out files holds, by name. Raises UserError."""
    loaders: dict[str, StatefulLoader[TokenBatch]] = {}
    for name, own in named_files(config).items():
        listed = own.listed()
        try:
            loaders[name] = build_loader(
                own.config, topology, vocab_size=vocab_size, held_out=True, files=listed, whole=True
            )
        except UserError as error:
            raise UserError(f"{own.flag} {error}") from None
    return loaders


@torch.no_grad()
def evaluate_files(system: EvaluatedByFile, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
    """`held_out/NAME/loss`, `ppl`, `bpb` where the tokenizer's bytes are known, and `labels` of each. Collective."""
    topology = sync_point.topology
    with shared_errors(topology):
        loaders = system.file_loaders(topology)
        byte_lengths = system.byte_lengths() if loaders else None
    scalars: dict[str, float] = {}
    was_training = model.training
    model.eval()
    try:
        for name, loader in loaders.items():
            nats, labels, covered = _sums(system, model, sync_point, loader, byte_lengths)
            loss = nats / max(1.0, labels)
            scalars[f"held_out/{name}/loss"] = loss
            scalars[f"held_out/{name}/ppl"] = math.exp(min(loss, 700.0))
            if covered:
                scalars[f"held_out/{name}/bpb"] = nats / math.log(2) / covered
            scalars[f"held_out/{name}/labels"] = labels
    finally:
        model.train(was_training)
    return Evaluation(scalars)


def _sums(
    system: Evaluated,
    model: nn.Module,
    sync_point: SyncPoint,
    loader: StatefulLoader[TokenBatch],
    byte_lengths: Tensor | None,
) -> tuple[float, float, float]:
    """Nats, counted labels and their bytes over all ranks; no bytes where they are not known."""
    found: Tensor | None = None
    for batch, losses, _ in run_loader(system, model, loader, sync_point, {"predict": False}):
        labels = batch.labels[:, sync_point.topology.shard(batch.labels.shape[1])]
        counted = labels != IGNORED
        covered = 0 if byte_lengths is None else byte_lengths.to(labels.device)[labels[counted]].sum()
        part = torch.stack([torch.as_tensor(value, device=labels.device).double() for value in (
            losses[counted].double().sum(), counted.sum(), covered,
        )])  # fmt: skip
        found = part if found is None else found + part
    assert found is not None
    if dist.is_initialized():
        dist.all_reduce(found)
    nats, count, length = found.tolist()
    return nats, count, length
