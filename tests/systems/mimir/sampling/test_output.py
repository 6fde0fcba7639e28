"""Files of drawn peptides: written whole, and read again as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation_result import Row
from pipeline.systems.mimir.data.table import read_tables
from pipeline.systems.mimir.sampling.output import as_text, write

ROWS: list[Row] = [
    {"label": 1, "target": "P1 human", "sequence": "ACDK", "length": 4, "nats": 9.5, "bits_per_residue": 3.426,
     "novel": "no", "edits": 0, "nearest": "ACDK"},
    {"label": 0, "target": "", "sequence": "WWWWWWWW", "length": 8, "nats": 19.0, "bits_per_residue": 3.4,
     "novel": "yes", "edits": 6, "nearest": "WWACDE"},
]  # fmt: skip
UNKNOWN: list[Row] = [{**row, "nats": None, "bits_per_residue": None, "edits": None} for row in ROWS]


@pytest.mark.parametrize("name", ["new.csv", "new.fasta", "NEW.FA"])
@pytest.mark.parametrize("rows", [ROWS, UNKNOWN])
def test_a_file_reads_as_data_again(name: str, rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path / name, rows)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    table = read_tables([str(tmp_path / name)])
    assert table.sequences.to_pylist() == ["ACDK", "WWWWWWWW"] and table.labels.to_pylist() == ["1", "0"]
    assert table.targets.to_pylist() == ["P1 human" if name.endswith("csv") else "P1_human", ""]


def test_every_value_is_in_the_files(tmp_path: Path) -> None:
    write(tmp_path / "new.csv", ROWS)
    assert (tmp_path / "new.csv").read_text().splitlines() == [
        "label,target,sequence,length,nats,bits_per_residue,novel,edits,nearest",
        "1,P1 human,ACDK,4,9.5,3.426,no,0,ACDK",
        "0,,WWWWWWWW,8,19.0,3.4,yes,6,WWACDE",
    ]
    write(tmp_path / "new.fasta", ROWS)
    facts = "label=1 target=P1_human length=4 nats=9.5 bits_per_residue=3.426 novel=no edits=0 nearest=ACDK"
    assert (tmp_path / "new.fasta").read_text().splitlines()[:2] == [f">peptide_1 {facts}", "ACDK"]


def test_a_table_has_no_empty_columns() -> None:
    assert as_text(ROWS) == (
        "sequence  label        target    length  bits/residue  novel  edits  nearest\n"
        "ACDK      interacting  P1 human       4         3.426  no         0  ACDK\n"
        "WWWWWWWW  background                  8           3.4  yes        6  WWACDE\n"
    )
    rows = [{**row, "target": "", "novel": None, "nearest": None} for row in UNKNOWN]
    assert as_text(rows).splitlines()[0] == "sequence  label        length"


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new\.csv: not written \(No such file or directory\): make it writable"):
        write(tmp_path / "gone" / "new.csv", ROWS)
