"""Sets that need no file, what a configuration names, and `data synth` and `data verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands.data import run_data
from pipeline.config import RunConfig
from pipeline.data_config import DataConfig
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.data.build import build_loader, list_peptides
from pipeline.systems.mimir.data.encode import decode
from pipeline.systems.mimir.data.process import Process, ProcessSettings, read_process
from pipeline.systems.mimir.data.synthetic import SETTINGS, synthetic_table
from pipeline.systems.mimir.data.table import read_table
from pipeline.systems.mimir.peptides import Peptides


def config(model: MimirConfig | None = None, **data: object) -> RunConfig:
    return RunConfig(
        recipe="mimir_tiny",
        model=model or MimirConfig(),
        steps=1,
        batch_size=8,
        sequence_length=20,
        lr=1e-3,
        data=DataConfig(**{"holdout": 0.1, **data}),  # type: ignore[arg-type]
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 2))
def test_a_synthetic_table_has_what_was_asked_for_and_nothing_twice(count: int, interacting: float, seed: int) -> None:
    process = Process(ProcessSettings(targets=3, motif=3, min_length=5, max_length=8))
    table = synthetic_table(process, count, interacting=interacting, seed=seed)
    rows = list(zip(table.labels.to_pylist(), table.targets.to_pylist(), table.sequences.to_pylist(), strict=True))
    assert len(set(rows)) == count
    assert sum(label == "1" for label, _, _ in rows) == round(count * interacting)
    assert all((label == "1") == (target in process.target_names) for label, target, _ in rows)
    own = {text for label, _, text in rows if label == "1"}
    assert not own & {text for label, _, text in rows if label == "0"}
    assert table.sequences.equals(synthetic_table(process, count, interacting=interacting, seed=seed).sequences)


def test_a_process_that_has_not_so_many_peptides_says_so() -> None:
    process = Process(ProcessSettings(targets=1, planted=1.0, min_length=4, max_length=4))
    with pytest.raises(UserError, match="--count: after 20 draws 1 of the peptides are copies still"):
        synthetic_table(process, 2, interacting=1.0)


def test_a_run_without_data_has_a_synthetic_set_with_its_targets_sequences() -> None:
    found = list_peptides(config(MimirConfig(target="encoder"), dataset="synthetic:1500"))
    process = Process(SETTINGS)
    assert found.target_sequences is not None
    known = dict(zip(process.target_names, process.target_sequences, strict=True))
    assert dict(zip(found.target_names, found.target_sequences, strict=True)) == known
    parts = (found.training, found.held_out, found.held_out_targets)
    assert 1400 < sum(map(len, parts)) <= 1500 and all(map(len, parts))
    assert found.training_targets == 29
    assert set(found.held_out_targets.targets.tolist()) == {29, 30, 31}


def test_loaders_of_a_run() -> None:
    run = config(dataset="synthetic:300")
    found = list_peptides(run)
    topology = Topology()
    training = build_loader(run, topology, found)
    assert training.state_dict()["fingerprint"]["source"]["digest"] == found.fingerprint
    held_out = build_loader(run, topology, found, held_out=True)
    targets = build_loader(run, topology, found, held_out=True, targets=True)
    assert {training.domain, held_out.domain, targets.domain} == {"train", "held out", "held-out targets"}
    assert (held_out.peptides, targets.peptides) == (found.held_out, found.held_out_targets)
    assert "equally often" in training.describe() and "equally often" not in held_out.describe()


@pytest.mark.parametrize(
    ("interacting", "most", "balanced", "read"),
    [(5, 100, True, 5), (300, 100, True, 50), (300, 0, True, 300), (5, 100, False, None), (5, 600, True, 5)],
)
def test_an_evaluation_reads_half_of_each_label_if_there_are_so_many(
    interacting: int, most: int, balanced: bool, read: int | None
) -> None:
    labels = np.repeat([1, 0], [interacting, 500]).astype(np.int8)
    lengths = np.full(len(labels), 8, np.uint8)
    held_out = Peptides(np.zeros((len(labels), 20), np.uint8), lengths, labels, np.full(len(labels), -1, np.int32))
    run = config(MimirConfig(balanced=balanced, held_out_peptides=most), dataset="synthetic:300")
    found = dataclasses.replace(list_peptides(run), held_out=held_out)
    labels = build_loader(run, Topology(), found, held_out=True).peptides.labels
    assert len(labels) == min(most or len(held_out), len(held_out))
    assert read is None or labels.sum() == read


def test_the_antimicrobial_peptides_of_modlamp() -> None:
    model = MimirConfig(max_length=50, min_length=5)
    found = list_peptides(config(model, dataset="modlamp"))
    parts = (found.training, found.held_out)
    texts = [text for part in parts for text in decode(part.letters, part.lengths, model.letters)]
    assert len(set(texts)) == len(texts)
    assert found.notes[0] == "270 of other lengths"
    left_out = sum(int(note.split()[0].replace(",", "")) for note in found.notes)
    assert len(texts) + left_out == 5200
    assert len(texts) > 4000 and max(map(len, texts)) == 50
    assert not found.target_names and not len(found.held_out_targets)
    assert 0.05 < len(found.held_out) / len(texts) < 0.15
    with pytest.raises(UserError, match="has peptides of 7 to 174 residues"):
        list_peptides(config(MimirConfig(min_length=2, max_length=6), dataset="modlamp"))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"dataset": "syntetic"}, "--data.dataset 'syntetic': give synthetic, synthetic:COUNT or modlamp"),
        ({}, {"dataset": "synthetic:0"}, "give 1 peptide or more"),
        ({"letters": "ACDE"}, {"dataset": "synthetic"}, "the synthetic set needs"),
        ({"letters": "ACDÉ"}, {}, "two or more different letters of A to Z"),
        ({"letters": "A"}, {}, "two or more different letters of A to Z"),
        ({}, {}, "no peptides are named: give files with --data.path, or --data.dataset synthetic"),
        ({}, {"mix": ("a=1",)}, "--data.mix is of text"),
        ({}, {"path": ("none.csv",)}, "none.csv does not exist"),
        ({"target": "encoder"}, {"path": ("SET",)}, "name them with --model.target-file"),
    ],
)
def test_data_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, model: dict[str, str], data: dict[str, object], message: str
) -> None:
    if data.get("path") == ("SET",):
        (tmp_path / "s.csv").write_text("label,target,sequence\n1,P1,ACDE\n")
        data = {"path": (str(tmp_path / "s.csv"),)}
    with pytest.raises(UserError, match=message):
        list_peptides(config(MimirConfig(**model), **data))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["set.csv", "set.parquet", "set.fasta"])
def test_a_set_that_is_made_passes_its_checks_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out, targets = tmp_path / "new" / name, tmp_path / "new" / "set.targets.fasta"
    run_data(["synth", "mimir", "--out", str(out), "--count", "400", "--targets", "6", "--seed", "2"])
    assert "entropy 2.27" in capsys.readouterr().out
    run_data(["verify", str(out), "--target-file", str(targets)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(" ok " in line for line in lines)
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([name, targets.name, "set.process.json"])
    process = read_process(out.with_name("set.process.json"))
    assert process.settings == ProcessSettings(targets=6, seed=2)
    assert read_table(out).sequences.equals(synthetic_table(process, 400).sequences)
    found = list_peptides(config(MimirConfig(target="encoder", target_file=str(targets)), path=(str(out),)))
    assert len(found.target_names) == 6 and found.target_sequences is not None


def test_a_check_that_fails_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("label,target,sequence\n1,P1,ACDE\n1,P1,ACDE\n0,,AC\n")
    with pytest.raises(UserError, match=r"2 checks failed \(lengths: .*a.csv, line 4: AC has 2 residues\): give 4 to"):
        run_data(["verify", str(path)])
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert [line.split("  ")[1] for line in failed] == ["lengths", "duplicate pairs"]
    with pytest.raises(UserError, match="--min-length 9 is above --max-length 8"):
        run_data(["verify", str(path), "--min-length", "9", "--max-length", "8"])


def test_files_are_checked_against_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.csv").write_text("label,target,sequence\n1,P1,ACDE\n0,,KLMN\n")
    (folder / "b.csv").write_text("label,target,sequence\n1,P1,ACDE\n0,,ACDE\n")
    (folder / "targets.fasta").write_text(">P1\nACDEFGHIKL\n")
    for words in ([str(folder)], [str(folder / "a.csv"), str(folder / "b.csv")]):
        with pytest.raises(
            UserError, match=r"2 checks failed .*b\.csv, line 2: ACDE stands at .*a\.csv, line 2 already"
        ):
            run_data(["verify", *words])
        failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
        assert [line.split("  ")[1] for line in failed] == ["duplicate pairs", "overlap"]
    (folder / "b.csv").unlink()
    run_data(["verify", str(folder)])
    first, *checks = capsys.readouterr().out.splitlines()
    assert first == f"{folder / 'targets.fasta'}  not read: no label= and no target= in its headers"
    assert len(checks) == 9 and all(line.startswith(f"{folder / 'a.csv'}  ") for line in checks)


def test_a_folder_of_token_files_is_checked_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "a.npy")
    (tmp_path / "about.csv").write_text("label,target,sequence\n1,P1,ACDE\n")
    run_data(["verify", str(tmp_path)])
    assert "a.npy  " in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.npy or \.bin file"):
        run_data(["verify", str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("synth", "data synth needs a system that makes sets: one of .*mimir"),
        ("synth mimri --out a.csv", "did you mean mimir"),
        ("synth mimir", "needs --out"),
        ("synth mimir --out a.txt", "--out .*a.txt: give a file that ends in .csv"),
        ("synth mimir --out a.csv --count 0", "--count is 0: give 1 or more"),
        ("synth mimir --out a.csv --interacting 2", "--interacting is 2.0: give a share"),
        ("synth mimir --out a.csv --min-length 3", "--min-length 3 has no room"),
    ],
)
def test_a_set_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_data(words.split())
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        run_data(["synth", "mimir", "--out", str(tmp_path / "a.csv")])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
