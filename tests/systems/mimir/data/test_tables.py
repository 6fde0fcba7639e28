"""Files of peptides: three formats, what is refused in one line, and the named checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.errors import UserError
from pipeline.systems.mimir.config import LETTERS, MimirConfig
from pipeline.systems.mimir.data.build import build_set
from pipeline.systems.mimir.data.checks import Expected, all_checks, check_table
from pipeline.systems.mimir.data.encode import decode, encode
from pipeline.systems.mimir.data.table import Table, read_table, read_tables, read_targets
from pipeline.systems.mimir.peptides import NO_TARGET

ROWS = [("1", "P1", "ACDEF"), ("0", "", "GHIKL"), ("1", "P2", "MNPQRST"), ("0", "", "VWYUXZB")]
EXPECTED = Expected(LETTERS, 4, 20)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def csv_of(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    return write(path, "label,target,sequence\n" + "".join(",".join(row) + "\n" for row in rows))


def columns(table: Table) -> list[tuple[str, str, str]]:
    return list(zip(table.labels.to_pylist(), table.targets.to_pylist(), table.sequences.to_pylist(), strict=True))


def table_of(*rows: tuple[str, str, str]) -> Table:
    return Table(*(pa.array(column, pa.string()) for column in zip(*rows, strict=True)), parts=(("s", len(rows)),))


def test_csv_parquet_and_fasta_give_the_same_rows(tmp_path: Path) -> None:
    csv_of(tmp_path / "a.csv", ROWS)
    labels, targets, texts = zip(*ROWS, strict=True)
    whole = pa.table({"sequence": texts, "label": [int(label) for label in labels], "other": [0.5] * 4,
                      "target": [target or None for target in targets]})  # fmt: skip
    pyarrow.parquet.write_table(whole, tmp_path / "a.parquet")
    records = ">x label=1 target=P1\nACD\nEF\n\n>y label=0\nGHIKL\n>z target=P2\nMNPQRST\n>label=0\nVWYUXZB\n"
    write(tmp_path / "a.fasta", records)
    for name in ("a.csv", "a.parquet", "a.fasta"):
        assert columns(read_table(tmp_path / name)) == ROWS
    both = read_tables([str(tmp_path / "a.csv"), str(tmp_path / "a.fasta")])
    assert columns(both) == ROWS + ROWS
    assert both.place(3) == f"{tmp_path / 'a.csv'}, line 5"
    assert both.place(4) == f"{tmp_path / 'a.fasta'}, record 1"
    write(tmp_path / "a.targets.fasta", ">P1\nACD\n")
    assert len(read_tables([str(tmp_path)])) == 12


def test_a_line_is_named_as_an_editor_counts_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\nlabel,target,sequence\r\n1,P1,ACDEF\r\n\r\n2,P1,ACDEF\r\n")
    with pytest.raises(UserError, match=r"a\.csv, line 5: the label is '2'.*give 1 for an interacting peptide"):
        check_table(read_table(path), EXPECTED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: give a file with the columns label, target, sequence"),
        ("label,sequence\n1,ACDE\n", "has no column target .*name its columns label, target, sequence"),
        ("sequence\nACDE\n", "has no column label and no column target"),
        ("label,target,sequence\n", "holds no peptide"),
        ("label,target,sequence,label\n1,P1,ACDE,1\n", "has two columns label: rename"),
        ("label,target,sequence\n1,P1,ACDE\n1,P1\n", "is no table .*3.*correct that row"),
    ],
)
def test_a_csv_that_is_no_table_of_peptides_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_called_by_its_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("label,target,sequence\n1,P1,ACDE\n".encode(encoding))
    with pytest.raises(UserError, match=r"a\.csv is UTF-16: save it as UTF-8 \(iconv"):
        read_table(path)
    path.write_bytes(b"label,target,sequence\n1,\0,ACDE\n")
    assert columns(read_table(path)) == [("1", "\0", "ACDE")]


@pytest.mark.parametrize("separator, called", [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_separators_than_commas_are_called_by_their_name(tmp_path: Path, separator: str, called: str) -> None:
    text = separator.join(["label", '"target"', "sequence", "score"]) + "\n"
    text += separator.join(["1", "P1", "ACDE", "0,5"]) + "\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.csv").write_bytes(mark + text.encode())
        with pytest.raises(UserError, match=f"a.csv has {called} between its columns: save it with commas"):
            read_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbflabel,target,sequence,a;b\n1,P1,ACDE,c;d\n")
    assert columns(read_table(tmp_path / "a.csv")) == [("1", "P1", "ACDE")]


def test_a_fasta_file_of_targets_in_a_folder_is_none_of_peptides(tmp_path: Path) -> None:
    targets = write(tmp_path / "human.fasta", ">P1 a protein\nACDEFGHIKL\n>P2\nMNPQ\n")
    with pytest.raises(UserError, match=r"holds no file of peptides \(human.fasta: no label= and no target= in its"):
        read_tables([str(tmp_path)])
    csv_of(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.fasta", ">x\nACDEF\n>y target=P1\nGHIKL\n")
    found = read_tables([str(tmp_path)])
    assert (len(found), found.skipped) == (len(ROWS) + 2, (str(targets),))
    assert [name for name, _ in found.parts] == [str(tmp_path / name) for name in ("a.csv", "b.fasta")]
    assert read_tables([str(tmp_path / "a.csv")]).skipped == ()
    # Where it is named itself, it is read, and what it lacks is said.
    with pytest.raises(UserError, match=r"human\.fasta, record 1: the label is ''"):
        check_table(read_tables([str(targets)]), EXPECTED)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("1", "P1", "ACJDE"), "letters: .*a.csv, line 3: 'ACJDE' has 'J'.*--model.letters"),
        (("1", "P1", "acde"), "line 3: 'acde' has 'a'"),
        (("1", "P1", "ACÄDE"), "line 3: 'ACÄDE' has 'Ä'"),
        (("1", "P1", "ACD"), "lengths: .*line 3: ACD has 3 residues: give 4 to 20, or change --model.min-length"),
        (("1", "P1", "A" * 21), "has 21 residues"),
        (("yes", "P1", "ACDE"), "labels: .*line 3: the label is 'yes'"),
        (("0", "P1", "ACDE"), "line 3: a background peptide with the target 'P1': leave the target"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named_with_its_fix(
    tmp_path: Path, row: tuple[str, str, str], message: str
) -> None:
    table = read_table(csv_of(tmp_path / "a.csv", [ROWS[0], row, ROWS[2]]))
    with pytest.raises(UserError, match=message):
        build_set(table, MimirConfig(), 0.0)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("label,target,sequence\r1,A,ACDEF\r0,,AC1EF\r", 3),
        ('label,target,sequence,note\n\n1,A,ACDEF,"a\nb"\n0,,AC1EF,c\n', 5),
    ],
    ids=["carriage returns alone", "a blank line and a break in quotes"],
)
def test_the_line_of_a_row_is_that_of_an_editor(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=f"a.csv, line {line}: 'AC1EF' has '1'"):
        check_table(read_table(path), EXPECTED)


def test_a_target_without_a_sequence_is_named_where_one_is_needed() -> None:
    table = table_of(*ROWS)
    build_set(table, MimirConfig(), 0.0, {"P1": "ACD"})
    with pytest.raises(UserError, match=r"s, row 3: the target 'P2' has no sequence: .*--model\.target-file"):
        build_set(table, MimirConfig(target="encoder"), 0.0, {"P1": "ACD"})
    found = build_set(table, MimirConfig(target="encoder"), 0.0, {"P1": "ACD", "P2": "EFG", "P3": "K"})
    assert found.target_sequences == ("ACD", "EFG")


def test_what_the_checks_say_of_rows(tmp_path: Path) -> None:
    def states(*rows: tuple[str, str, str]) -> dict[str, bool | None]:
        return {check.name: check.ok for check in all_checks(table_of(*rows), EXPECTED)}

    right = states(*ROWS)
    assert set(right) == {
        "labels", "letters", "lengths", "background targets", "targets", "duplicate pairs", "duplicate background",
        "overlap", "length match",
    }  # fmt: skip
    assert all(right.values())
    for name, row in {
        "duplicate pairs": ROWS[0],
        "duplicate background": ROWS[1],
        "overlap": ("0", "", ROWS[0][2]),
        "targets": ("1", "", "KLKLKL"),
        "background targets": ("0", "P1", "KLKLKL"),
        "letters": ("0", "", "OOOO"),
        "lengths": ("0", "", "AAA"),
    }.items():
        assert [check for check, ok in states(*ROWS, row).items() if ok is False] == [name]
    assert states(*ROWS, ("1", "P3", ROWS[0][2]))["duplicate pairs"]
    assert states(*((label, "", text) for label, _, text in ROWS))["targets"]
    assert states(ROWS[0], ROWS[2])["length match"] is None
    second = table_of(*ROWS, ROWS[1])
    (check,) = (check for check in all_checks(second, EXPECTED) if check.ok is False)
    assert check.found == "s, row 5: GHIKL stands at s, row 2 already"


def test_lengths_match_where_chance_explains_the_difference() -> None:
    def matches(background: np.ndarray) -> bool | None:
        generator = np.random.default_rng(0)
        texts = ["".join(row) for row in generator.choice(list("ACDEFGHIKL"), (4000, 20))]
        lengths = [*generator.integers(8, 21, 2000).tolist(), *background.tolist()]
        rows = [(str(int(row < 2000)), "", texts[row][: lengths[row]]) for row in range(4000)]
        return {check.name: check.ok for check in all_checks(table_of(*rows), EXPECTED)}["length match"]

    assert matches(np.random.default_rng(1).integers(8, 21, 2000))
    assert matches(np.random.default_rng(1).integers(9, 21, 2000)) is False


def test_lengths_that_no_byte_holds_are_refused() -> None:
    with pytest.raises(UserError, match=r"--model\.max-length 256: peptides have 255 residues at most"):
        build_set(table_of(*ROWS), MimirConfig(max_length=256), 0.0)


def test_the_sequences_of_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "t.fasta", ">sp|P04637|P53_HUMAN Cellular\nMEE\nPQ\n>T2 words\nACD\n")
    assert read_targets(path) == {"P04637": "MEEPQ", "T2": "ACD"}
    for text, message in {
        "ACD\n>T1\nACD\n": "line 1: residues before the first header",
        ">T1\n": "record 1 .*no residues in capital letters",
        ">T1\nAC\n>T1\nAD\n": "record 2: 'T1' stands there twice",
        ">\nAC\n": "record 1 has no name",
        "": "holds no sequence",
    }.items():
        with pytest.raises(UserError, match=message):
            read_targets(write(path, text))
    with pytest.raises(UserError, match="cannot be read"):
        read_targets(tmp_path / "none.fasta")


def test_letters_to_ids_and_back() -> None:
    texts = [text for _, _, text in ROWS]
    array = pa.array(["?", *texts]).slice(1)
    ids = encode(array, LETTERS, 9)
    assert ids.shape == (4, 9)
    assert decode(ids, np.array([len(text) for text in texts]), LETTERS) == texts
    assert ids[0].tolist() == [LETTERS.index(letter) for letter in texts[0]] + [0] * 4


def test_a_set_knows_its_rows_and_what_it_left_out() -> None:
    found = build_set(table_of(*ROWS, ROWS[0], ("0", "", ROWS[2][2])), MimirConfig(), 0.0)
    assert found.notes == ("1 copies", "1 background that interacts as well")
    assert (found.target_names, found.training_targets) == (("P1", "P2"), 2)
    assert found.training.targets.tolist() == [0, NO_TARGET, 1, NO_TARGET]
    assert decode(found.training.letters, found.training.lengths, LETTERS) == [text for _, _, text in ROWS]
    other = build_set(table_of(*ROWS), MimirConfig(), 0.0)
    assert other.fingerprint == found.fingerprint
    assert build_set(table_of(*ROWS[:3]), MimirConfig(), 0.0).fingerprint != found.fingerprint
