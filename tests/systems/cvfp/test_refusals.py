"""Bad input of the system through the command line: one line with the fix, exit code 2, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.cli import main
from tests.launch.forked import forked
from tests.systems.cvfp.data.harness import json_lines

TEXTS = [f"{index:02} words of text" for index in range(40)]
SMALL = (
    "--model.width 16 --model.layers 1 --batch-size 4 --sequence-length 8 --num-samples 20 --data.dataset None"
    " --data.path texts.jsonl --max-iterations 1 --epochs 1"
)
Refused = Callable[[str], str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Checks a small run with more flags, which must end with exit code 2 and one line on stderr: returns it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    json_lines(tmp_path / "texts.jsonl", TEXTS)

    def run(flags: str) -> str:
        capsys.readouterr()
        assert main(["check", "cvfp_tiny", *SMALL.split(), *flags.split()]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("mnemos: ") and len(line) < 400
        assert not Path("outputs").exists() or not list(Path("outputs").rglob("*.pt"))
        return line

    return run


def test_a_small_run_is_not_refused(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "cvfp_tiny", *SMALL.split()]) == 0, capsys.readouterr().err
    # As UltraChat's recipe reads files.
    assert main(["check", "cvfp_tiny", *SMALL.split(), "--data.text-field", "messages"]) == 0, capsys.readouterr().err


def test_rows_shorter_than_two_tokens(refused: Refused, tmp_path: Path) -> None:
    json_lines(tmp_path / "short.jsonl", ["words", "w", "more words"])
    line = refused("--data.path short.jsonl")
    assert "short.jsonl (byte 18) has 1 token, and a row needs 2" in line and "--data.min-tokens 2" in line
    assert "--sequence-length 1" in refused("--sequence-length 1") and not Path("cache").exists()


def test_a_missing_validation_file(refused: Refused) -> None:
    assert "--evaluation.path absent.txt" in refused("--evaluation.path absent.txt")
    assert not Path("cache").exists()


def test_a_tokenizer_that_does_not_match_the_embedding(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"transformer.wte.weight": torch.zeros(1000, 16)}, tmp_path / "model" / "model.safetensors")
    line = refused("--model.embedding model")
    assert "--data.tokenizer bytes has 260 ids and --model.embedding model 1,000 rows" in line
    assert "name the tokenizer of that model" in line


def test_a_cache_of_other_data(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    for samples in ("20", "12"):
        assert main(["check", "cvfp_tiny", *SMALL.split(), "--num-samples", samples]) == 0, capsys.readouterr().err
    twelve, twenty = sorted(Path("cache").iterdir())
    twelve.write_bytes(twenty.read_bytes())
    line = refused("--num-samples 12")
    assert str(twelve) in line and "documents of other data than its name says (samples): remove it" in line


def test_a_setting_that_the_guide_has_and_this_does_not(refused: Refused) -> None:
    assert "give --data.tokenizer" in refused("--vocab-size 50257")
    assert "DS_ACCELERATOR=cpu before the command" in refused("--device cuda")


def test_token_states_of_other_weights(tmp_path: Path) -> None:
    """Which a run in a forked process finds as it begins the phase that reads them."""
    json_lines(tmp_path / "texts.jsonl", TEXTS)
    small = SMALL.replace("texts.jsonl", str(tmp_path / "texts.jsonl")).split()
    words = [*small, "--freeze-context", "--phases", "prediction", "--report.no-plots", "--cache-dir"]

    def train(name: str) -> tuple[int, str]:
        done = forked(
            1, "pipeline", "train", "cvfp_tiny", *words, str(tmp_path / "cache"), "--output-dir", str(tmp_path / name)
        )
        return done.returncode, done.stderr

    code, errors = train("first")
    assert code == 0, errors
    (states,) = (tmp_path / "cache").glob("frozen_*")
    save_file({"0.0": torch.zeros(1, 16)}, states, {"key": "of other weights"})
    code, errors = train("second")
    lines = [line for line in errors.splitlines() if line.startswith("mnemos: ")]
    assert code == 2 and lines, errors
    assert lines[-1] == f"mnemos: {states}: holds the token states of other weights or other data: remove it"
    assert not list((tmp_path / "second").glob("checkpoints/checkpoint-*"))
