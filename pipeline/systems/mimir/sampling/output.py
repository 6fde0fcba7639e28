"""Drawn peptides as a table for a person, as CSV and as FASTA; both files can be read as data again."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError, brief, out_of_space
from pipeline.evaluation_result import Row

HEADINGS = {"bits_per_residue": "bits/residue"}
WORDS = ("sequence", "target", "novel", "nearest")
"""Columns of text."""


def as_text(rows: Sequence[Row]) -> str:
    """A table under the names of its columns; columns without any value are left out, and the label is words."""
    shown = [{**row, "label": "interacting" if row["label"] else "background"} for row in rows]
    names = ["sequence", *(name for name in _columns(rows) if name not in ("sequence", "nats"))]
    names = [name for name in names if any(row[name] not in (None, "") for row in shown)]
    table = [[HEADINGS.get(name, name) for name in names], *([_cell(row[name]) for name in names] for row in shown)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [name in (*WORDS, "label") for name in names]
    lines = (
        "  ".join(
            cell.ljust(width) if words else cell.rjust(width)
            for cell, width, words in zip(cells, widths, left, strict=True)
        ).rstrip()
        for cells in table
    )
    return "".join(f"{line}\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """With the columns label, target and sequence first, as data has them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_fasta(rows: Sequence[Row]) -> str:
    """A record each, whose header has a number and the other columns as NAME=VALUE; white space in a value is `_`."""
    names = [name for name in _columns(rows) if name != "sequence"]
    records = []
    for number, row in enumerate(rows, 1):
        facts = [f"{name}={'_'.join(_cell(row[name]).split())}" for name in names if row[name] not in (None, "")]
        records.append(f">peptide_{number} {' '.join(facts)}\n{row['sequence']}\n")
    return "".join(records)


def write(path: Path, rows: Sequence[Row]) -> None:
    """The file of drawn peptides, by its suffix; whole or not at all. Raises UserError."""
    content = as_csv(rows) if path.suffix.lower() == ".csv" else as_fasta(rows)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        fix = "make room there" if out_of_space(error) else "make it writable, or name another file"
        raise UserError(f"{path}: not written ({error.strerror or brief(error)}): {fix}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    return list(rows[0]) if rows else []


def _cell(value: str | float | int | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
