"""`data synth mimir`, and `data verify` of files of peptides."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet
import tyro

from pipeline.errors import UserError
from pipeline.files.given_path import expanded
from pipeline.files.output import writing
from pipeline.systems.mimir.config import LETTERS, check_letters
from pipeline.systems.mimir.data.checks import Expected, all_checks
from pipeline.systems.mimir.data.process import Process, ProcessSettings
from pipeline.systems.mimir.data.synthetic import synthetic_table
from pipeline.systems.mimir.data.table import COLUMNS, NO_PEPTIDES, SUFFIXES, Table, read_tables, read_targets
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING

TARGETS, PROCESS = ".targets.fasta", ".process.json"
"""What stands in place of a set's suffix in the names of the files beside it."""


@dataclass(frozen=True)
class SynthOptions:
    """Makes peptides of which a share interacts with targets, whose motifs they hold, from a process whose entropy is
    known exactly."""

    out: Path | None = None
    """File for the peptides (.csv, .parquet or .fasta). Beside it: NAME.targets.fasta, the targets' sequences, and
    NAME.process.json, the process."""
    count: int = 20_000
    """Peptides, of both labels."""
    interacting: float = 0.5
    """Share of them that interacts with a target."""
    draw_seed: int = 0
    """Of the peptides: another one makes other peptides of the same process."""
    process: Annotated[ProcessSettings, tyro.conf.arg(name="")] = field(default_factory=ProcessSettings)


@dataclass(frozen=True)
class VerifyOptions:
    """Checks files or folders of peptides, all together, as training reads them: labels, letters, lengths, targets,
    duplicates, overlap, and whether the background has the lengths of the interacting peptides. Exit code 2 when a
    check fails."""

    letters: Annotated[str, tyro.conf.arg(aliases=["--model.letters"])] = LETTERS
    """Letters that residues may have."""
    min_length: Annotated[int, tyro.conf.arg(aliases=["--model.min-length"])] = 4
    """Residues of the shortest peptide."""
    max_length: Annotated[int, tyro.conf.arg(aliases=["--model.max-length"])] = 20
    """Residues of the longest peptide."""
    target_file: Annotated[str | None, tyro.conf.arg(aliases=["--model.target-file"])] = None
    """FASTA file that must have the amino-acid sequence of every target."""


class PeptideCommands:
    """A `DataCommands` of pipeline/data_commands.py."""

    suffixes: tuple[str, ...] = SUFFIXES
    synth_options: Any = SynthOptions()
    verify_options: Any = VerifyOptions()

    def synth(self, options: SynthOptions) -> None:
        if options.out is None:
            raise UserError("data synth needs --out: the file for the peptides")
        out = expanded(str(options.out))
        if out.suffix.lower() not in SUFFIXES:
            raise UserError(f"--out {out}: give a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if options.count < 1:
            raise UserError(f"--count is {options.count}: give 1 or more")
        if options.draw_seed < 0:
            raise UserError(f"--draw-seed is {options.draw_seed}: give 0 or more")
        if not 0 <= options.interacting <= 1:
            raise UserError(f"--interacting is {options.interacting}: give a share from 0 to 1")
        targets, facts = (out.with_name(out.stem + ending) for ending in (TARGETS, PROCESS))
        for path in (out, targets, facts):
            if path.exists():
                raise UserError(f"{path} is there already: remove it, or give another --out")
        process = Process(options.process)
        table = synthetic_table(process, options.count, interacting=options.interacting, seed=options.draw_seed)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _replacing(targets, lambda path: _write_targets(path, process))
            _replacing(facts, process.write)
            _replacing(out, lambda path: _write(path, table, out.suffix.lower()))
        kinds = ((INTERACTING, "interacting"), (BACKGROUND, "background"))
        entropy = " and ".join(f"{process.entropy_per_residue(label):.4f} ({name})" for label, name in kinds)
        print(f"{out}: {len(table):,} peptides, {len(process.motifs):,} targets; entropy {entropy} nats per residue")
        print(f"{targets}: the targets' sequences; {facts}: the process")

    def verify(self, files: Sequence[str], options: VerifyOptions) -> None:
        if options.min_length > options.max_length:
            raise UserError(
                f"--min-length {options.min_length} is above --max-length {options.max_length}: exchange them"
            )
        check_letters(options.letters, "--letters")
        known = None if options.target_file is None else read_targets(expanded(options.target_file)).keys()
        expected = Expected(options.letters, options.min_length, options.max_length, known)
        failed: list[str] = []
        fix = ""
        table = read_tables(files)
        for skipped in table.skipped:
            print(f"{skipped}  not read: {NO_PEPTIDES}")
        for check in all_checks(table, expected):
            state = {True: "ok", False: "FAILED", None: "not checked"}[check.ok]
            print(f"{table.name}  {check.name:<20}  {state:<11}  {check.found}", flush=True)
            if check.ok is False:
                fix = fix or check.fix
                failed.append(f"{check.name}: {check.found}")
        if failed:
            count = f"{len(failed)} checks failed" if len(failed) > 1 else "a check failed"
            raise UserError(f"{count} ({failed[0]}): {fix}")


def _replacing(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_targets(path: Path, process: Process) -> None:
    pairs = zip(process.target_names, process.target_sequences, strict=True)
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in pairs))


def _write(path: Path, table: Table, suffix: str) -> None:
    columns = (table.labels, table.targets, table.sequences)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), path)
        return
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    with path.open("w", newline="") as file:
        if suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
            return
        for number, (label, target, sequence) in enumerate(rows, 1):
            file.write(f">P{number} label={label}{f' target={target}' if target else ''}\n{sequence}\n")
