"""What cannot run is refused by the command line before any rank starts: a line, the fix, exit code 2, no file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.manifest import LATEST, point
from pipeline.checkpoint.restore import TRAINER_STATE
from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.cli import main
from pipeline.config import replace
from pipeline.config_file import save_config
from pipeline.load import model_without_storage
from pipeline.recipes.neuromorphic import neuromorphic_tiny
from pipeline.run import Progress
from tests.checkpoint.whole import write_whole
from tests.systems.neuromorphic.harness import documents

Refused = Callable[..., str]
FLAGS = {
    "a preset that does not exist": (
        "neuromorphic --preset fast",
        "--preset 'fast': no recipe is called 'neuromorphic_fast': give facts or phase_a_to_b or phase_a_to_c or",
    ),
    "a tier that does not exist": (
        "neuromorphic --tier d",
        "invalid choice 'd' for argument '--tier/--model.tier'. Expected one of ('a', 'a_wide', 'b', 'c', 'tiny')",
    ),
    "a phase that does not exist": (
        "neuromorphic_tiny --phase D",
        "--phase 'D': not a phase of neuromorphic_tiny: it has A",
    ),
    "phase C without a checkpoint": (
        "neuromorphic_tiny --phase C",
        "--phase C: it goes on from the checkpoint that ended B, and there is none: name it with --resume PATH",
    ),
    "its preset without one": (
        "neuromorphic --preset phase_c_from_ckpt --tier tiny --tokenizer bytes",
        "--phase C: it goes on from the checkpoint that ended B, and there is none: name it with --resume PATH",
    ),
    "phase C from no weights": (
        "neuromorphic_tiny --phases C",
        "--phases C: it goes on from weights with a trained episodic memory: name a checkpoint of phase B or C with",
    ),
    "phase C behind A alone": (
        "neuromorphic_tiny --phases A C",
        "--phases A C: it goes on from weights with a trained episodic memory: name a checkpoint of phase B or C with",
    ),
    "a span that is longer than the window": (
        "neuromorphic_tiny --model.span 128",
        "--model.span 128 is longer than the window of 64: give at most that",
    ),
    "heads that do not divide their width": (
        "neuromorphic_tiny --n-heads-decoder 3",
        "--model.decoder-heads 3 does not divide the width of the decoder 64: give a divisor of it",
    ),
    "a width that its heads do not divide": (
        "neuromorphic_tiny --d-dec 65",
        "--model.decoder-heads 2 does not divide the width of the decoder 65: give a divisor of it",
    ),
    "heads of the working memory": (
        "neuromorphic_tiny --model.working-heads 5",
        "--model.working-heads 5 does not divide the working width 32: give a divisor of it",
    ),
    "a head of an odd width": (
        "neuromorphic_tiny --model.working-width 34",
        "--model.working-width 34: a head of 17 cannot be turned by its position, which takes pairs: give",
    ),
    "a factor that is none": (
        "neuromorphic_tiny --model.eligibility-decay=-3",
        "--model.eligibility-decay is -3.0: give a factor from 0 to 1",
    ),
    "strengths that would grow": (
        "neuromorphic_tiny --model.decay 7",
        "--model.decay is 7.0: give a factor from 0 to 1",
    ),
    "a batch that the ranks do not divide": (
        "neuromorphic_tiny --global-batch-size 12 --batch-size 8",
        "--global-batch-size 12 is no multiple of --batch-size 8 on 2 data ranks: give --batch-size 6",
    ),
    "two phases that contradict each other": (
        "neuromorphic_tiny --phase A --phases A B",
        "--phases A B and --phase A are both given: keep one",
    ),
}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The line that a command line is refused with."""
    documents(tmp_path / "documents")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        own = ["--launch-ranks", "2", "--data.path", "documents", "--data.holdout", "0.2", "--output-dir", "out"]
        code = main(["check", *words.split(), *own])
        out, err = capsys.readouterr()
        assert code == 2, f"not refused: {out}{err}"
        (line,) = err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line.removeprefix("mnemos: ")

    return run


def checkpoint(phase: str, done: bool) -> Path:
    """One of neuromorphic_tiny in a phase: what is read of it before a run begins."""
    config = replace(neuromorphic_tiny(), data__dataset=None, data__path=("documents",), data__holdout=0.2)
    folder = Path("earlier/checkpoints/checkpoint-7")
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    before = tuple("ABC"[: "ABC".index(phase)])
    progress = Progress(7, phase, phase_start=2, phase_done=done, phases_before=before)
    (folder / TRAINER_STATE).write_text(json.dumps(dataclasses.asdict(progress)))
    sizes = {name: parameter.shape for name, parameter in model_without_storage(config).model.named_parameters()}
    save_file({name: torch.zeros(shape) for name, shape in sizes.items()}, folder / TRAINABLE)
    write_whole(folder, {"system": "neuromorphic", "global_batch": 16})
    point(folder.with_name(LATEST), folder.name)
    return folder


@pytest.mark.parametrize(("words", "line"), FLAGS.values(), ids=FLAGS.keys())
def test_flags_that_cannot_be(refused: Refused, words: str, line: str) -> None:
    assert refused(words).startswith(line)


def test_a_checkpoint_of_another_tier(refused: Refused) -> None:
    folder = checkpoint("B", done=True)
    line = refused(f"neuromorphic_tiny --tier a --resume {folder.with_name('latest.pt')}")
    assert line.startswith(
        f"{folder} was trained with --model.tier tiny, this run has a: give the same, or take its weights, where"
    )
    line = refused(f"neuromorphic_tiny --tier a --init-from {folder.with_name('latest')}")
    assert line.startswith(f"--init-from {folder} was trained with --model.tier tiny, this run has a, and its ")
    assert line.endswith(": give --model.tier tiny, or a checkpoint that was trained with a")


@pytest.mark.parametrize("phase, done, state", [("A", True, "ended A"), ("A", False, "is inside A, at step 5 of it")])
def test_phase_c_without_a_trained_episodic_memory(refused: Refused, phase: str, done: bool, state: str) -> None:
    folder = checkpoint(phase, done)
    line = refused(f"neuromorphic_tiny --phase C --resume {folder.with_name('latest.pt')}")
    assert line.startswith(f"{folder} {state}, and --phase C needs one that ended B: name another with --resume PATH")
    line = refused(f"neuromorphic_tiny --phases C --init-from {folder}")
    assert line.startswith(f"--init-from {folder} is of phase A, which trains no episodic memory: name a checkpoint of")


def test_what_fits_is_silent(capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    folder = checkpoint("B", done=True)
    own = ["--launch-ranks", "2", "--data.path", "documents", "--data.holdout", "0.2", "--output-dir", "out"]
    latest = str(folder.with_name("latest.pt"))
    for words in (["--phase", "C", "--resume", latest], ["--phases", "C", "--init-from", latest]):
        assert main(["check", "neuromorphic_tiny", *words, *own]) == 0
        assert capsys.readouterr() == ("", "")
