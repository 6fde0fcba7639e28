"""Which windows and documents a step of a run has read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.resume import check_fingerprint
from pipeline.data.tokens.build import build_window_loader, sidecars_of
from pipeline.data.tokens.documents import FoundDocument, documents_from
from pipeline.data.tokens.files import TokenFile
from pipeline.data.tokens.listing import list_token_data
from pipeline.data.tokens.sidecar import Sidecar
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology

if TYPE_CHECKING:
    from pipeline.config import RunConfig

ANY_ID = 1 << 32
"""A vocabulary that holds every id."""


@dataclass(frozen=True)
class SeenWindow:
    """What one row of a step has read."""

    row: int
    file: TokenFile
    start: int
    """Its first token in the file."""
    documents: tuple[FoundDocument, ...]
    """Those that have a token in the window, as far as it is known what ends a document."""
    sidecar: Sidecar | None = None
    """Of the file."""


def windows_seen(
    config: RunConfig, state: Mapping[str, Any], *, rows: int, step: int, saved_at: int, eos_id: int | None
) -> Iterator[SeenWindow]:
    """The windows of step `step` of a run whose checkpoint of step `saved_at` has the loader's `state`.

    `rows`: the global batch. `eos_id`: what ends a document where neither configuration nor sidecar says. Raises
    UserError when the files are others now, or the step belongs to an earlier phase.
    """
    # What the run has found at its start: the size of the model's vocabulary decided it, which is not known here.
    dtypes = {part["dtype"] for key, part in state["fingerprint"]["source"].items() if key != "ratios"}
    narrow = dtypes == {"uint16"} and not config.data.token_header
    ends = config.data.eos_id if config.data.eos_id is not None else state["fingerprint"].get("eos_id")
    data = dataclasses.replace(config.data, token_dtype="uint16" if narrow else config.data.token_dtype, eos_id=ends)
    config = dataclasses.replace(config, data=data, batch_size=rows, grad_accum=1)
    loader = build_window_loader(config, Topology(world=1), list_token_data(data), vocab_size=ANY_ID, held_out=False)
    check_fingerprint(state["fingerprint"], loader.fingerprint)
    # Of a run of several phases, the loader has read the steps of the last one alone.
    before = step - 1 - (saved_at - int(state["windows"]) // rows)
    if before < 0:
        raise UserError(
            f"--step {step} is of an earlier phase of the run, or of the trainer that it was converted from: give a"
            " checkpoint that was saved in that phase"
        )
    sources, windows, _ = loader.windows_of_step(loader.order.taken_after(before * rows))
    beside = sidecars_of(loader)
    for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
        file, start = loader.sources[source].place(window)
        sidecar = beside[file.name]
        end = data.eos_id if data.eos_id is not None else sidecar.eos_id if sidecar is not None else eos_id
        found = []
        if end is not None:
            for document in documents_from(file, sidecar, end, start):
                if document.start >= start + loader.length:
                    break
                found.append(document)
        yield SeenWindow(row, file, start, tuple(found), sidecar)
