"""What is refused before any rank starts: one line that names the thing, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli import main

ZERO = {
    "a list": ([], "not a DeepSpeed configuration"),
    "a section that is a list": ({"zero_optimization": [1]}, "not a DeepSpeed configuration"),
    "no such stage": ({"zero_optimization": {"stage": 7}}, "stage is 7"),
    "an optimizer": ({"optimizer": {"type": "Adam"}}, "'optimizer' is decided by the recipe"),
    "float16": ({"fp16": {"enabled": True}}, "'fp16' is decided by the recipe"),
    "shards of another order than is said": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin_gradients has no checkpoints",
    ),
    "shards of a part of the ranks": (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
        "mics_shard_size has no checkpoints",
    ),
    "state on disk": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "NVMe offload has no checkpoints",
    ),
    "half a number": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.5}},
        "reduce_bucket_size: Input should",
    ),
    "a misspelt section": ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
    "another batch": ({"gradient_accumulation_steps": 7}, 'write "auto" there'),
}

FLAGS = {
    "an infinite rate": ("--lr inf", "--lr is inf"),
    "a rate that is no number": ("--lr nan", "--lr is nan"),
    "no document is long enough": ("--data.min-tokens 100000000", "--data.min-tokens"),
    "no held-out document is": ("--data.min-tokens 150000", "held"),
    "ids beyond the vocabulary": ("--model.backbone.vocabulary 100", "vocabulary"),
    "nothing to resume": ("--resume must", "no complete checkpoint"),
    "heads of an odd size": ("--model.backbone.heads 128 --model.backbone.kv-heads 128", "odd size"),
    "nothing to train": ("--model.backbone.no-trainable --model.memory.layers", "nothing is trained"),
    "a backend of another device": ("--model.attention.backend flex", "runs on cuda, not on cpu"),
    "a degree beyond the heads": ("--parallel.sequence 8", "does not divide"),
    "a degree beyond the ranks": ("--parallel.sequence 4", "does not divide the 2 ranks"),
    "a file that is not there": ("--data.path absent.txt", "absent.txt"),
    "weights that are not there": ("--init-from absent", "absent"),
}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*words: str, ranks: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["check", "miras_tiny", *words, "--launch-ranks", str(ranks), "--output-dir", "out"])
        out, err = capsys.readouterr()
        assert code == 2, f"not refused: {out}{err}"
        (line,) = err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize(("words", "reason"), FLAGS.values(), ids=FLAGS.keys())
def test_a_flag_that_cannot_work_is_refused(refused, words: str, reason: str) -> None:
    assert reason in refused(*words.split(), ranks=8 if words == "--parallel.sequence 8" else 2)


@pytest.mark.parametrize(("content", "reason"), ZERO.values(), ids=ZERO.keys())
def test_a_deepspeed_file_that_cannot_work_is_refused(refused, tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    assert reason in refused("--zero", str(path))


def test_weights_that_are_cut_short_are_refused(refused, tmp_path: Path) -> None:
    (tmp_path / "trainable.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    assert "trainable.safetensors: cannot be read" in refused("--init-from", str(tmp_path))


def test_an_empty_file_is_refused(refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused("--data.path", "empty.txt")


def test_what_works_is_silent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", "miras_tiny", "--launch-ranks", "2", "--output-dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
