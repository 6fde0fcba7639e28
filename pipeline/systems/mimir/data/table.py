"""Files of peptides as they are read: the text of three columns, and how messages name a row."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from pipeline.errors import UserError, brief, shown
from pipeline.files.given_path import expanded

COLUMNS = ("label", "target", "sequence")
TABLE_SUFFIXES = (".csv", ".parquet")
FASTA_SUFFIXES = (".fasta", ".fa", ".faa")
SUFFIXES = TABLE_SUFFIXES + FASTA_SUFFIXES
NO_PEPTIDES = "no label= and no target= in its headers"
"""Why a FASTA file of a folder is not one of peptides, but of targets for instance."""


@dataclass(frozen=True)
class Table:
    """Peptides as text: three columns of strings of one length. label: "0" background, "1" interacting. target: a name,
    or "" where there is none. sequence: residues in letters.

    `parts`: (file, rows) in their order, so that a row can be named. `skipped`: files of folders that are not of
    peptides.
    """

    labels: pa.StringArray
    targets: pa.StringArray
    sequences: pa.StringArray
    parts: tuple[tuple[str, int], ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def name(self) -> str:
        """The files, in a few words."""
        names = [name for name, _ in self.parts]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def place(self, row: int) -> str:
        """A row in words: "set.csv, line 17", or "set.fasta, record 16"."""
        for name, rows in self.parts:
            if row < rows:
                return _place(Path(name), row)
            row -= rows
        raise IndexError(row)


def read_tables(paths: Sequence[str]) -> Table:
    """The peptides of files or folders, one after the other. Raises UserError."""
    skipped: list[str] = []
    tables = [read_table(path) for name in paths for path in _files(expanded(name), skipped)]
    if not tables:
        raise UserError(f"--data.path names no file of peptides: give {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return Table(
        pa.concat_arrays([table.labels for table in tables]),
        pa.concat_arrays([table.targets for table in tables]),
        pa.concat_arrays([table.sequences for table in tables]),
        tuple(table.parts[0] for table in tables),
        tuple(skipped),
    )


def _files(path: Path, skipped: list[str]) -> list[Path]:
    """A file, or those of peptides in a folder; adds to `skipped` what there is of other FASTA files."""
    if not path.is_dir():
        return [path]
    every = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    others = [file for file in every if file.suffix.lower() in FASTA_SUFFIXES and not _may_hold_peptides(file)]
    found = [file for file in every if file not in others]
    if not found:
        beside = f" ({', '.join(file.name for file in others)}: {NO_PEPTIDES})" if others else ""
        raise UserError(f"{path} holds no file of peptides{beside}: name one of {', '.join(SUFFIXES)}")
    skipped += map(str, others)
    return found


def _may_hold_peptides(path: Path) -> bool:
    """Whether a FASTA file has a header with a label or a target, or none at all, which is to be said of it."""
    headers = 0
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            for line in file:
                if not line.startswith(">"):
                    continue
                if any(word.startswith(("label=", "target=")) for word in line[1:].split()):
                    return True
                headers += 1
    except OSError:
        # What is wrong with it is said where it is read.
        return True
    return not headers


def read_table(path: Path) -> Table:
    """The peptides of one file, by its suffix. Raises UserError."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is no file of peptides: give one of {', '.join(SUFFIXES)}")
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path")
    try:
        columns = _FORMATS[suffix](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or brief(error)}): check the file") from error
    if not len(columns["sequence"]):
        raise UserError(f"{path} holds no peptide: give a file with at least one")
    parts = ((str(path), len(columns["sequence"])),)
    return Table(columns["label"], columns["target"], columns["sequence"], parts)


def _read_csv(path: Path) -> dict[str, pa.StringArray]:
    # In one thread, errors name their row.
    reading = pyarrow.csv.ReadOptions(use_threads=False)
    kept = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False)
    try:
        with path.open("rb") as file:
            begin = file.read(1024)
        if not begin:
            raise UserError(f"{path} is empty: give a file with the columns {', '.join(COLUMNS)}")
        _check_encoding(path, begin)
        _check_separator(path, begin)
        return _columns(path, pyarrow.csv.read_csv(path, read_options=reading, convert_options=kept))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no table ({brief(error)}): correct that row") from error


def _check_encoding(path: Path, begin: bytes) -> None:
    """Raises UserError for a file that begins as UTF-16 does: with its mark, or with every other byte 0."""
    zeros = [begin[place::2].count(0) / len(begin) for place in (0, 1)]
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (max(zeros) > 0.4 and min(zeros) == 0):
        raise UserError(f"{path} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)")


def _check_separator(path: Path, begin: bytes) -> None:
    """Raises UserError for a file whose columns are not separated by commas."""
    header = next(iter(begin.decode("utf-8-sig", "replace").strip().splitlines()), "")
    for separator, called in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        if set(COLUMNS) <= {name.strip().strip('"') for name in header.split(separator)}:
            raise UserError(f"{path} has {called} between its columns: save it with commas")


def _read_parquet(path: Path) -> dict[str, pa.StringArray]:
    try:
        return _columns(path, pyarrow.parquet.read_table(path, partitioning=None))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file ({brief(error)}): write it again") from error


def _columns(path: Path, table: pa.Table) -> dict[str, pa.StringArray]:
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path} has no column {' and no column '.join(missing)} (it has {shown(', '.join(table.column_names))}):"
            f" name its columns {', '.join(COLUMNS)}"
        )
    twice = [name for name in COLUMNS if table.column_names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]}: rename one of them")
    found = {}
    for name in COLUMNS:
        try:
            chunks = table[name].cast(pa.string()).chunks
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"{path}: the column {name} is of {table[name].type}, not text: write it as text"
            ) from error
        found[name] = pc.fill_null(pa.concat_arrays([pa.array([], pa.string()), *chunks]), "")
    return found


def _read_fasta(path: Path) -> dict[str, pa.StringArray]:
    """Of each record's header, the words label=... and target=...; a target alone means that it interacts."""
    found: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for header, sequence in read_fasta(path):
        words = dict(word.split("=", 1) for word in header.split() if "=" in word)
        target = words.get("target", "")
        found["target"].append(target)
        found["label"].append(words.get("label", "1" if target else ""))
        found["sequence"].append(sequence)
    return {name: pa.array(values, pa.string()) for name, values in found.items()}


_FORMATS = {".csv": _read_csv, ".parquet": _read_parquet, **dict.fromkeys(FASTA_SUFFIXES, _read_fasta)}


def read_fasta(path: Path) -> list[tuple[str, str]]:
    """(header without ">", sequence) of each record. Raises UserError; OSError where the file cannot be read."""
    records: list[tuple[str, list[str]]] = []
    try:
        text = path.read_text("ascii")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no FASTA file (byte {error.start} is no letter): write it as plain text") from None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith(">"):
            records.append((line[1:].strip(), []))
        elif line and not records:
            raise UserError(f"{path}, line {number}: residues before the first header: begin with a line >NAME")
        elif line:
            records[-1][1].append(line)
    return [(header, "".join(parts)) for header, parts in records]


def read_targets(path: Path) -> dict[str, str]:
    """Amino-acid sequences by the target's name, of a FASTA file: the first word of a header, or the accession of
    UniProt's headers (>sp|P04637|P53_HUMAN ...). Raises UserError."""
    try:
        records = read_fasta(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the path") from error
    found: dict[str, str] = {}
    for number, (header, sequence) in enumerate(records, 1):
        word = (header.split() or [""])[0]
        parts = word.split("|")
        name = parts[1] if len(parts) > 2 and parts[0] in ("sp", "tr") else word
        if not name:
            raise UserError(f"{path}, record {number} has no name: begin its header with the target's")
        if not sequence.isalpha() or not sequence.isupper():
            raise UserError(f"{path}, record {number} ({shown(name)}): no residues in capital letters: correct it")
        if found.get(name, sequence) != sequence:
            raise UserError(f"{path}, record {number}: {shown(name)} stands there twice, with two sequences: keep one")
        found[name] = sequence
    if not found:
        raise UserError(f"{path} holds no sequence: give a FASTA file of the targets")
    return found


def _place(path: Path, row: int) -> str:
    suffix = path.suffix.lower()
    if suffix in FASTA_SUFFIXES:
        return f"{path}, record {row + 1}"
    if suffix != ".csv" or not os.path.exists(path):
        return f"{path}, row {row + 1}"
    # Blank lines are no rows, and a quoted field may have line breaks. The header is the first row.
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file)
        ends = (rows.line_num for found in rows if found)
        line = next((line for count, line in enumerate(ends) if count == row + 1), None)
    return f"{path}, row {row + 1}" if line is None else f"{path}, line {line}"
