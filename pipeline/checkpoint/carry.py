"""The carry on disk: every rank writes its streams and heads; any layout of ranks reads the parts it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.files import Entry, write_tensors
from pipeline.parallel.topology import Topology
from pipeline.system import Carry, CarryEntry


def carry_content(
    carries: Sequence[Carry], streams: Sequence[Sequence[int]], topology: Topology
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of carry-RANK.safetensors: the rows of every micro-batch, with the global streams they
    belong to. The tensors are those of the carry.

    `carries` and `streams` have one entry per micro-batch of a step.
    """
    content: dict[str, Tensor] = {}
    entries = []
    for index, carry in enumerate(carries):
        for name, entry in carry.items():
            if entry.heads is None and topology.sequence_rank != 0:
                continue
            content[f"{index}/{name}"] = entry.tensor.detach()
            entries.append({"micro": index, "name": name, "streams_dim": entry.streams, "heads_dim": entry.heads})
    layout = {
        "entries": entries,
        "streams": [list(map(int, ids)) for ids in streams],
        "sequence": topology.sequence,
        "sequence_rank": topology.sequence_rank,
    }
    return content, {"layout": json.dumps(layout)}


def write_carry(content: dict[str, Tensor], path: Path, layout: dict[str, str]) -> Entry:
    """Writes what `carry_content` returned."""
    # A file of its own bytes: views would share theirs, or hold those of a larger tensor.
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
    return write_tensors(own, path, layout)


def load_carry(folder: Path, streams: Sequence[Sequence[int]], topology: Topology, device: torch.device) -> list[Carry]:
    """The carry of this rank's streams and heads per micro-batch, whatever layout wrote it; [] when none was saved."""
    # (name, stream) -> [(sequence rank, degree, row)]
    rows: dict[tuple[str, int], list[tuple[int, int, Tensor]]] = {}
    dims: dict[str, tuple[int, int | None]] = {}
    wanted = {stream for ids in streams for stream in ids}
    for path in sorted(folder.glob("carry-*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            layout = json.loads(handle.metadata()["layout"])
            for entry in layout["entries"]:
                ids = layout["streams"][entry["micro"]]
                if not wanted.intersection(ids):
                    continue
                tensor = handle.get_tensor(f"{entry['micro']}/{entry['name']}")
                dims[entry["name"]] = (entry["streams_dim"], entry["heads_dim"])
                for row, stream in enumerate(ids):
                    part = tensor.narrow(entry["streams_dim"], row, 1)
                    rows.setdefault((entry["name"], stream), []).append(
                        (layout["sequence_rank"], layout["sequence"], part)
                    )
    carries: list[Carry] = []
    for ids in streams:
        carry: Carry = {}
        for name, (stream_dim, heads_dim) in dims.items():
            whole = []
            for stream in ids:
                parts = sorted(rows[name, stream], key=lambda part: part[0])
                whole.append(parts[0][2] if heads_dim is None else torch.cat([p[2] for p in parts], dim=heads_dim))
            tensor = torch.cat(whole, dim=stream_dim)
            if heads_dim is not None:
                local = topology.heads(tensor.shape[heads_dim])
                tensor = tensor.narrow(heads_dim, local.start, local.stop - local.start)
            carry[name] = CarryEntry(tensor.contiguous().to(device), stream_dim, heads_dim)
        carries.append(carry)
    return carries if dims else []
