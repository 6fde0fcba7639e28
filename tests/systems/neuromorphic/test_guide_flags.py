"""Flags of the prototype's trainer that are no field here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.recipes.neuromorphic import TOKENIZER
from pipeline.systems.neuromorphic.guide_flags import in_own_flags


def parsed(words: str) -> RunConfig:
    return parse_run(["neuromorphic", "--preset", "phase_a_to_c", *words.split()], "train")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--save-dir runs/one/checkpoints", "--output-dir runs/one"),
        ("--save_dir=runs/one", "--output-dir runs/one"),
        ("--metrics-file runs/one/metrics.jsonl --seed 3", "--output-dir runs/one --seed 3"),
        ("--metrics-file=metrics.jsonl", "--output-dir ."),
        ("--save-dir one/checkpoints --metrics-file one/metrics.jsonl", "--output-dir one"),
        ("--phases A,B", "--phases A B"),
        ("--phases=A,C --seed 2", "--phases A C --seed 2"),
        ("--tokenizer tinyllama", f"--data.tokenizer {TOKENIZER}"),
        ("--tokenizer=smollm", "--tokenizer HuggingFaceTB/SmolLM2-135M"),
        ("--tokenizer gpt2", "--data.tokenizer gpt2"),
        ("--snapshot --bs 48", "--bs 48"),
        ("--no-snapshot --bs 48", "--model.no-decoder --bs 48"),
    ],
)
def test_what_they_mean(words: str, meant: str) -> None:
    assert parsed(words) == parsed(meant)


def test_a_folder_of_a_short_name_is_meant_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinyllama").mkdir()
    assert parsed("--tokenizer tinyllama").data.tokenizer == "tinyllama"


def test_a_run_directory_that_is_named_has_no_id() -> None:
    config = parsed("--save-dir runs/one/checkpoints")
    assert (config.output_dir, config.run_id) == (Path("runs/one"), None)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--metrics-file m.jsonl", "--metrics-file 'm.jsonl': a run has its metrics in metrics.jsonl of its folder"),
        (
            "--save-dir a --metrics-file b/metrics.jsonl",
            "--save-dir 'a' and --metrics-file 'b/metrics.jsonl' are of two",
        ),
        ("--save-dir a --run-name b", "--save-dir and --run-name are both given, and each names the run directory"),
        ("--save-dir", "--save-dir needs a value"),
        ("--phase A --phases A B", "--phases A B and --phase A are both given: keep one"),
        ("--phases A,B --phase=B", "--phases A B and --phase B are both given: keep one"),
    ],
)
def test_what_they_cannot_mean_is_one_line_with_the_flag_to_use(words: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(words)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_other_words_are_left_alone() -> None:
    words = ["--data.path", "a,b", "--steps=3", "-v", "--phase", "B", "--tokenizer"]
    assert in_own_flags(words) == words
    with pytest.raises(UserError, match="unknown flag --save-dir"):
        parse_run(["miras_tiny", "--save-dir", "x"], "train")


def test_a_phase_of_a_presets_phases_may_run_alone() -> None:
    config = parse_run("neuromorphic --preset phase_a_to_b --phase B".split(), "train")
    assert (config.phases, config.phase) == (("A", "B"), "B")
