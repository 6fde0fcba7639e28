"""Token states of frozen blocks on disk: computed once, and read by every run of the same weights and data."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from pipeline.errors import UserError, brief
from pipeline.files.json_file import parse_json
from pipeline.files.output import write_json
from pipeline.parallel.collectives import all_gather_object, broadcast_object, raise_together, shared_errors
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.data.cache import make_folder, not_writable
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet

logger = logging.getLogger(__name__)

_BLOCK = 16 << 20


@dataclass(frozen=True)
class StatesKey:
    """What decides the states: one file holds those of one key."""

    weights: str
    """`weights_hash` of all that computes them."""
    data: str
    """The fingerprint of the documents."""
    how: str
    """How contexts are carried, with what decides where they begin: such as `document`, or `stream of 64 rows`."""
    tokens: int
    """Of the documents that are trained on."""
    width: int

    @property
    def short(self) -> str:
        return blake2b(json.dumps(asdict(self)).encode(), digest_size=6).hexdigest()


def states_key(documents: DocumentSet, weights: str, how: str, width: int) -> StatesKey:
    """The key of the training documents' states [tokens, width]."""
    return StatesKey(weights, documents.fingerprint, how, int(documents.ends[documents.training - 1]), width)


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of whole tensors, given with their names, whatever their order: of the embedding, its norm and the blocks.
    Tensors that ZeRO divides are to be gathered before."""
    parts = []
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        state = xxh3_128(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        state.update(value.view(-1).view(torch.uint8).numpy().data)
        parts.append(state.hexdigest())
    return blake2b("".join(sorted(parts)).encode(), digest_size=16).hexdigest()


class FrozenStates:
    """The states of a file, by the places of rows in the data: a batch of any layout finds its own."""

    def __init__(self, states: np.ndarray) -> None:
        """states [tokens, D] float32, in the order of `DocumentSet.tokens`."""
        self._states = states

    def of(self, batch: DocumentBatch) -> Tensor:
        """States [rows, L, D] float32 on the batch's device, 0 beyond a row's length."""
        found = torch.zeros(*batch.ids.shape, self._states.shape[1])
        for row, (first, length) in enumerate(zip(batch.first.tolist(), batch.lengths.tolist(), strict=True)):
            if length:
                # A copy: what is mapped may not be written to.
                found[row, :length] = torch.from_numpy(np.array(self._states[first : first + length]))
        return found.to(batch.ids.device)


def states_path(folder: Path, documents: DocumentSet, key: StatesKey) -> Path:
    """The file of the states of a key; beside it, `.json`, what it is of."""
    return folder / f"{documents.name}_states_{key.short}.npy"


def frozen_states(
    folder: Path,
    documents: DocumentSet,
    key: StatesKey,
    topology: Topology,
    compute: Callable[[], Iterable[tuple[DocumentBatch, Tensor]]],
) -> FrozenStates:
    """The states of the training documents: those of the file, or where there is none those that `compute` gives, which
    are written to it.

    `compute()` yields this rank's batches of one pass, each with its states [rows, L, D]; it may wait for other ranks.
    The folder is one that all ranks see. Collective; raises UserError on every rank for a file of other weights or
    data, where the folder cannot be written, and where not every token was computed.
    """
    path = states_path(folder, documents, key)
    there, partial = False, path.with_name(f".{path.name}.{os.getpid()}.partial")
    with shared_errors(topology):
        if topology.rank == 0:
            there = _is_there(path, key)
            if not there:
                make_folder(folder)
                _create(partial, key)
    there, partial = broadcast_object(topology, (there, partial))
    if not there:
        _fill(path, partial, key, topology, compute)
    found: np.ndarray | None = None
    with shared_errors(topology):
        if not path.is_file():
            raise UserError(f"--model.data-cache {folder}: not every rank sees it: name a folder on a shared disk")
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    assert found is not None
    return FrozenStates(found)


def _is_there(path: Path, key: StatesKey) -> bool:
    """Whether the states are in the file; a damaged one is to be written anew. Raises UserError for one of another
    key."""
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        return False
    try:
        facts: dict[str, Any] = parse_json(about.read_bytes())
        held, digest = facts["key"], facts["digest"]
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is no description of states (%s): they are computed again", about, brief(error, 80))
        return False
    if held != asdict(key):
        other = [name for name, value in asdict(key).items() if not isinstance(held, dict) or held.get(name) != value]
        raise UserError(f"{path}: token states of other {' and '.join(other)}: remove it and {about.name}")
    if _digest(path) != digest:
        logger.warning("%s does not hold what was written to it: the states are computed again", path)
        return False
    return True


def _digest(path: Path) -> str:
    state = xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _create(path: Path, key: StatesKey) -> None:
    """A file of that size, in numpy's format, all zeros."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (key.tokens, key.width)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * key.tokens * key.width)


def _fill(
    path: Path,
    partial: Path,
    key: StatesKey,
    topology: Topology,
    compute: Callable[[], Iterable[tuple[DocumentBatch, Tensor]]],
) -> None:
    problem, written, file = None, 0, -1
    with contextlib.ExitStack() as stack:
        try:
            file = os.open(partial, os.O_RDWR)
            stack.callback(os.close, file)
        except OSError as error:
            problem = str(not_writable(path.parent, error))
        # To the end whatever happens: other ranks may wait for this one in `compute`.
        for batch, states in compute():
            if problem is None:
                try:
                    written += _write(file, batch, states, key)
                except OSError as error:
                    problem = str(not_writable(path.parent, error))
    total = sum(all_gather_object(topology, written))
    if problem is None and total != key.tokens:
        problem = f"{path}: states of {total:,} tokens were computed, of {key.tokens:,}"
    try:
        raise_together(topology, problem)
    except UserError:
        if topology.rank == 0:
            partial.unlink(missing_ok=True)
        raise
    with shared_errors(topology):
        if topology.rank == 0:
            about = path.with_suffix(".json")
            # What it says of the file that is replaced holds no longer, also where this process ends in between.
            about.unlink(missing_ok=True)
            os.replace(partial, path)
            write_json(about, {"key": asdict(key), "digest": _digest(path)})


def _write(file: int, batch: DocumentBatch, states: Tensor, key: StatesKey) -> int:
    """Writes the states [rows, L, D] of a batch to their places; how many tokens they are of. Raises OSError.

    Not through a mapping, where a full disk kills the process.
    """
    rows = states.detach().float().cpu().numpy()
    header = os.fstat(file).st_size - 4 * key.tokens * key.width
    for row, first, length in zip(rows, batch.first.tolist(), batch.lengths.tolist(), strict=True):
        if length:
            data, offset = np.ascontiguousarray(row[:length], "<f4").data.cast("B"), header + 4 * first * key.width
            while data:
                count = os.pwrite(file, data, offset)
                data, offset = data[count:], offset + count
    return int(batch.lengths.sum())
