"""What `export` leaves: the same bytes for the same weights, and nothing where it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.callbacks.metrics import read_rows
from pipeline.config import replace
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError
from pipeline.export import gate, write
from pipeline.export.command import run_export
from pipeline.export.gate import Case, Difference
from tests.export.small_checkpoints import checkpoint_of, dense, with_memory


def export(*words: object) -> None:
    run_export([str(word) for word in words])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_folder_has_all_that_transformers_needs(
    tmp_path: Path, no_process: list[Case], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(tmp_path / "run", dense("olmo", tied=True), torch.bfloat16)
    export(tmp_path / "run", tmp_path / "out")
    assert list(content(tmp_path / "out")) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "OlmoForCausalLM" and model.dtype == torch.bfloat16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 256
    assert model.generation_config.pad_token_id == 256 and model.config.max_position_embeddings == 96
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 96
    made = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3)
    assert made.shape == (1, 7)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert not any(str(tmp_path).encode() in text for text in content(tmp_path / "out").values())
    (case,) = no_process
    assert case.states["logits"].dtype == torch.float32 and case.ids.shape == (1, 96)
    line = capsys.readouterr().out
    assert line.startswith(f"{checkpoint} -> {tmp_path / 'out'}: a OlmoForCausalLM of ")
    assert not list(tmp_path.glob(".*"))


def test_the_same_weights_are_the_same_bytes(tmp_path: Path, no_process: list[Case]) -> None:
    checkpoint_of(tmp_path / "one", dense())
    checkpoint_of(tmp_path / "other" / "run", dense())
    (tmp_path / "b").mkdir()  # an empty folder is as good as none
    export(tmp_path / "one", tmp_path / "a")
    export(tmp_path / "other" / "run", tmp_path / "b")
    assert {**content(tmp_path / "a"), "README.md": b""} == {**content(tmp_path / "b"), "README.md": b""}


def test_without_a_tokenizer(tmp_path: Path, no_process: list[Case]) -> None:
    checkpoint_of(tmp_path / "run", dense())
    export(tmp_path / "run", tmp_path / "out", "--no-tokenizer")
    checkpoint_of(tmp_path / "task", replace(dense(), data__recall=RecallConfig()))
    export(tmp_path / "task", tmp_path / "recall")
    for folder in (tmp_path / "out", tmp_path / "recall"):
        assert not any("tokenizer" in name for name in content(folder))
        assert "AutoModelForCausalLM.from_pretrained" in (folder / "README.md").read_text()
    assert [case.tokenizer for case in no_process] == [None, None]


def test_other_logits_leave_nothing_but_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(tmp_path / "run", dense())
    places = {"embedding": (0.0, 1.0), "block 0": (0.3, 2.0), "logits": (0.5, 3.0)}
    other = Difference(places, "OlmoForCausalLM", "its logits differ")
    monkeypatch.setattr(write, "compare", lambda cases: [other])
    with pytest.raises(UserError, match=f"{tmp_path / 'out'}: not exported: its logits differ"):
        export(tmp_path / "run", tmp_path / "out")
    assert [line.split()[:1] for line in capsys.readouterr().out.splitlines()] == [
        ["place"],
        ["embedding"],
        ["block"],
        ["logits"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")],
    ids=["of the system", "of safetensors"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpoint_of(tmp_path / "run", dense())

    def fail(self: object, folder: Path, **_: object) -> None:
        (Path(folder) / "half").write_text("half")
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(
        UserError, match=f"{tmp_path / 'out'}: not written .*No space left on device.*: make room there"
    ):
        export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("begun", [False, True], ids=["before the process", "with the process"])
def test_sigterm_leaves_neither_a_folder_nor_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: bool
) -> None:
    checkpoint_of(tmp_path / "run", dense())
    place, pid = tmp_path / "temporary", tmp_path / "pid"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}; kill -TERM $PPID; exec sleep 600\n")
    program.chmod(0o700)
    monkeypatch.setattr(gate.sys, "executable", str(program))
    if not begun:
        monkeypatch.setattr(write, "compare", lambda cases: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as found:
        export(tmp_path / "run", tmp_path / "out")
    assert found.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "stopped (SIGTERM); nothing was written" in capsys.readouterr().err
    assert not list(place.iterdir()) and not list(tmp_path.glob("*out*"))
    if begun:
        assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_damaged_checkpoint_has_a_fix_that_export_has(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "run", dense())
    older = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-2"))
    (checkpoint / "trainable.safetensors").unlink()
    os.utime(older / "manifest.json")
    for path, said in ((older, f"give {older}$"), (None, "give another checkpoint$")):
        with pytest.raises(UserError, match=rf"trainable\.safetensors: missing: restore the file, or {said}"):
            export(tmp_path / "run", tmp_path / "out")
        if path is not None:
            shutil.rmtree(path)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_of(tmp_path / "run", dense())
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"out: 1.0 MiB free, .* MiB needed: make room there"):
        export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_cannot_be_the_new_one_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "run", dense())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, said in (
        (tmp_path / "full", "not empty"), (tmp_path / "full" / "mine", "a file"),
        (tmp_path / "link", "a link"), (checkpoint / "hub", "inside the checkpoint"),
        (tmp_path / "full" / "mine" / "out", "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{out}: .*{said}|{said}"):
            export(checkpoint, out)
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["a"], "export needs CHECKPOINT and the new folder DIR"),
        (["a", "b", "c"], "export needs CHECKPOINT and the new folder DIR"),
        (["a", ""], "export needs CHECKPOINT and the new folder DIR"),
        (["", "b"], "export needs CHECKPOINT and the new folder DIR"),
        (["a", "b", "--data.tokenizer", ""], "--data.tokenizer needs a value"),
        (["a", "b", "--memory"], "unknown flag --memory"),
        (["a", "b", "--data.tokeniser=x"], "did you mean --data.tokenizer"),
        (["a", "b", "--data.tokenizer"], "--data.tokenizer needs a value"),
    ],
)
def test_words_that_are_none_of_the_command(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_export(words)


def test_a_model_without_a_memory_has_none_to_write(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "run", dense())
    with pytest.raises(UserError, match="--memory-only: olmo_tiny has no memory: leave it out"):
        export(tmp_path / "run", tmp_path / "out", "--memory-only")


def test_a_memory_that_was_not_trained_alone_is_not_written_alone(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "run", with_memory(trainable=True))
    with pytest.raises(UserError, match="--memory-only: miras_tiny trained its backbone too"):
        export(tmp_path / "run", tmp_path / "out", "--memory-only")


def test_a_process_of_its_own_confirms_a_whole_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as a person gives it, with what the run and its evaluations left."""
    checkpoint = checkpoint_of(tmp_path / "run", dense("llama", kv_heads=2))
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"mode": "val", "step": 2, "loss": 9.0}\n{"mode": "val", "step": 3, "loss": 1.25, "tokens": 4, "bpb": null}\n'
    )
    (tmp_path / "run" / "run.json").write_text(
        f'{{"command": ["/bin/mnemos", "train", "olmo_tiny", "--output-dir", "{tmp_path}/run"], "commit": "abc"}}'
    )
    task = {"downstream/a/acc": 0.75, "downstream/a/acc_stderr": 0.125, "downstream/a/chance": 0.25,
            "downstream/a/n": 24, "downstream/a/exact_match": 0.5}  # fmt: skip
    counted = {"loss": 0.5, "other": None, "labels": 4096, "documents": 2}
    memory = {"memory_off/loss": 0.75, "gap/share": 0.25, "gap/labels": 64}
    words = ["--tasks", "a", f"--task-path={tmp_path}/tasks", "--limit", "24"]
    for place, scalars, command in (
        ("", {**counted, **memory}, []),
        ("downstream", task, ["mnemos", "eval", str(checkpoint), "--suite", "downstream", *words]),
    ):
        folder = tmp_path / "run" / "evals" / checkpoint.name / place
        folder.mkdir(parents=True, exist_ok=True)
        recorded = {"command": command} if command else {}
        (folder / "evaluation.json").write_text(json.dumps({"scalars": scalars, **recorded}))
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2
    export(checkpoint, tmp_path / "out")
    assert "a LlamaForCausalLM of" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    evaluated = "mnemos eval checkpoint-3 --suite downstream --tasks a --task-path=tasks --limit 24"
    rows = [line for line in card.splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| loss | 1.25 |  | `mnemos train olmo_tiny --output-dir run` |",
        f"| downstream/a/acc | 0.75 | standard error 0.125, n 24, chance 0.25 | `{evaluated}` |",
        f"| downstream/a/exact_match | 0.5 | n 24 | `{evaluated}` |",
        "| loss | 0.5 | 4,096 labels, 2 documents | not recorded |",
        "| memory_off/loss | 0.75 | 4,096 labels, 2 documents | not recorded |",
        "| gap/share | 0.25 | 64 labels | not recorded |",
    ]
    for text in ("library_name: transformers", "a process with transformers alone loaded this folder", "commit abc",
                 "3 of 1,200", "source files of the Python standard library", "recipe: olmo_tiny"):  # fmt: skip
        assert text in card
    assert str(tmp_path) not in card and "$" not in card
