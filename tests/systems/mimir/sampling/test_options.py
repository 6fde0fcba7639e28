"""What a user can get wrong of the options: one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.systems.mimir.sampling.options import PeptideOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "-n 0: give 1 or more"),
        ({"min_length": 0}, "--min-length 0: give 1 or more"),
        ({"min_length": 9, "max_length": 8}, "--min-length 9 is above --max-length 8: exchange them"),
        ({"temperature": -0.5}, "--temperature -0.5: give 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan: give 0 or more"),
        ({"guidance": float("inf")}, "--guidance inf: give 0 or more"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"likelihood": -1}, "--likelihood -1: give 0 or more"),
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"interacting": True, "non_interacting": True}, "--interacting and --non-interacting are both given"),
        ({"target": "A", "target_sequence": "MK"}, "--target and --target-sequence are both given"),
        ({"target_sequence": "M K"}, "--target-sequence is no sequence of amino acids"),
        ({"output": Path("new.txt")}, "--output new.txt: give a file that ends in .csv, .fasta, .fa or .faa"),
        ({"output": Path("no/new.csv")}, "--output no/new.csv: there is no folder no"),
        ({"output": Path("old.csv")}, "--output old.csv is there already"),
    ],
)
def test_refused(options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text("kept")
    with pytest.raises(UserError) as error:
        PeptideOptions(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert Path("old.csv").read_text() == "kept"
