"""Antimicrobial peptides of APD3 and peptides of UniProt, as modlamp (BSD-3) carries them: labels, no targets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.systems.mimir.data.table import Table

NAME = "modlamp"


def amp_table(min_length: int, max_length: int) -> tuple[Table, tuple[str, ...]]:
    """The peptides of modlamp's AMPvsUniProt of such lengths, antimicrobial ones as interacting, and what was left out
    of them. Raises UserError without modlamp."""
    try:
        from modlamp.datasets import load_AMPvsUniProt
    except ModuleNotFoundError:
        raise UserError(f"--data.dataset {NAME} needs the package modlamp: pip install -e '.[mimir]'") from None
    loaded = load_AMPvsUniProt()
    lengths = np.char.str_len(loaded.sequences)
    kept = (lengths >= min_length) & (lengths <= max_length)
    if not kept.any():
        raise UserError(
            f"--data.dataset {NAME} has peptides of {lengths.min()} to {lengths.max()} residues: change"
            " --model.min-length and --model.max-length"
        )
    count = int(kept.sum())
    table = Table(
        pa.array(loaded.target[kept].astype(str).tolist(), pa.string()),
        pa.array([""] * count, pa.string()),
        pa.array(loaded.sequences[kept].tolist(), pa.string()),
        parts=(("AMPvsUniProt of modlamp", count),),
    )
    other = int((~kept).sum())
    return table, (f"{other:,} of other lengths",) if other else ()
