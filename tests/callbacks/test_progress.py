"""What a person sees holds what is promised, and nothing that is not known."""

from __future__ import annotations

import dataclasses
import io
import os
import pty
import re
import subprocess
import sys
import termios
from typing import Any

import pytest

from pipeline.callbacks.progress import ProgressLines, clock
from pipeline.phases import Phases
from pipeline.system import Evaluation
from tests.callbacks.conftest import CountingSystem, NamedSystem


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())


@pytest.fixture
def line(make_run, record, capsys: pytest.CaptureFixture[str], no_terminal):
    """The line that a step leaves; `done` steps and the config's `changes` come before."""

    def make(record_changes: dict, done: int = 0, **changes) -> str:
        lines = ProgressLines(make_run(step=done, **changes))
        lines.on_start()
        lines.on_step(record(**record_changes))
        (text,) = capsys.readouterr().out.splitlines()
        return text

    return make


def test_a_step_says_all_that_is_promised(line) -> None:
    text = line({"step": 5}, steps=150)
    for part in ("step 5/150", "loss 2.5000", "lr 3.00e-04", "grad 0.750", "4.1K tok/s", "1.50 GiB", "ETA 0:02:25"):
        assert part in text


def test_a_step_says_its_epoch(make_run, record, capsys: pytest.CaptureFixture[str], no_terminal) -> None:
    run = make_run(step=10)
    run.system = CountingSystem(run.config)
    ProgressLines(run).on_step(record(10))
    assert "  epoch 1.25  loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "step, progress",
    [
        (1, "Progress: 4,096/32,768 (12.5%) | Speed: 2048 tok/s | ETA: 14s"),
        (8, "Progress: 32,768/32,768 (100.0%) | Speed: 2048 tok/s | ETA: 0s"),
        (10, "Progress: 8,192/32,768 (25.0%) | Speed: 2048 tok/s | ETA: 12s"),
    ],
)
def test_a_progress_line_says_how_far_the_pass_over_the_data_is(
    make_run, record, capsys: pytest.CaptureFixture[str], no_terminal, step: int, progress: str
) -> None:
    run = make_run(step=step, report__progress_line=True)
    run.system = CountingSystem(run.config)
    ProgressLines(run).on_step(record(step, tok_s=2048.0))
    first, second = capsys.readouterr().out.splitlines()
    assert first == progress and second.startswith(f"step {step}/")


def test_a_progress_line_without_passes_is_of_the_phase(make_run, record, capsys, no_terminal) -> None:
    ProgressLines(make_run(step=3, report__progress_line=True)).on_step(record(3))
    text = capsys.readouterr().out.splitlines()[0]
    assert text.startswith("Progress: 12,288/") and text.endswith("ETA: 197s")


def test_the_eta_is_the_steps_left_at_the_measured_speed(line) -> None:
    # A step of 4 x 1024 tokens at 4096 tokens/s takes a second.
    assert line({"step": 100}, steps=10_000).endswith("ETA 2:45:00")
    assert line({"step": 100}, steps=10_000, stop_after=130).endswith("ETA 0:00:30")
    assert line({"step": 100}, steps=10_000, grad_accum=4).endswith("ETA 11:00:00")
    assert line({"step": 150}, steps=150).endswith("ETA 0:00:00")


def test_scores_of_tasks_have_a_line_of_their_own(make_run, capsys: pytest.CaptureFixture[str], no_terminal) -> None:
    lines = ProgressLines(make_run())
    named = {"words/acc": 0.625, "words/acc_stderr": 0.1, "words/chance": 0.25, "words/n": 40, "last/perplexity": 12.5}
    lines.on_evaluation(3, Evaluation({"loss": 2.0, **{f"downstream/{name}": value for name, value in named.items()}}))
    first, second = capsys.readouterr().out.splitlines()
    assert "downstream" not in first and "words" not in first
    assert second.strip() == "words/acc 0.625 | last/perplexity 12.5"


def test_the_eta_is_smoothed(make_run, record, capsys: pytest.CaptureFixture[str], no_terminal) -> None:
    lines = ProgressLines(make_run(steps=102))
    lines.on_step(record(1, tok_s=4096.0))
    lines.on_step(record(2, tok_s=2048.0))
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 0:01:50")


def test_the_last_step_is_where_the_run_stops(line) -> None:
    assert "step 5/30" in line({"step": 5}, steps=150, stop_after=30)
    assert "step 5/150" in line({"step": 5}, steps=150, stop_after=300)


def test_mfu_is_said_only_where_it_is_known(line) -> None:
    assert "MFU" not in line({"mfu": None})
    assert "MFU 41.2%" in line({"mfu": 0.412})


def test_an_overflow_is_said_with_the_scale_that_was_too_large(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLines(make_run()).on_overflow(3, 65536.0)
    said = "step 3: gradients overflow at loss scale 65536, update skipped; the scale is lowered"
    assert said in capsys.readouterr().out


def test_a_skipped_update_is_said(line) -> None:
    assert "grad skipped" in line({"grad_norm": None})


def test_a_wait_for_data_is_said_where_there_is_one(line) -> None:
    assert "data 12%" in line({"data_wait": 0.12}) and line({"data_wait": 0.004}) == line({})


def test_the_metrics_of_a_system_are_left_to_evaluations(line) -> None:
    assert line({"metrics": {"norm_M": 1.2345, "memory/alpha": 0.001}}) == line({})


def test_the_columns_of_step_lines_stand_under_each_other_and_are_short(
    make_run, record, capsys: pytest.CaptureFixture[str], no_terminal
) -> None:
    lines = ProgressLines(make_run(steps=50_000))
    for step, changes in ((1, {"loss": 11.7654}), (99, {"grad_norm": 123.4}), (100, {"grad_norm": None}),
                          (50_000, {"tok_s": 999_400.0, "peak_memory": 90 * 2**30})):  # fmt: skip
        lines.on_step(record(step, **changes))
    texts = capsys.readouterr().out.splitlines()
    assert len({tuple(text.index(name) for name in ("loss", "lr", "grad", "ETA")) for text in texts}) == 1
    assert max(map(len, texts)) <= 100


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_shown(line, loss: float) -> None:
    assert f"loss {loss}" in line({"loss": loss})


def test_evaluations_checkpoints_and_the_end_are_lines(
    make_run, capsys: pytest.CaptureFixture[str], no_terminal
) -> None:
    run = make_run(step=50)
    lines = ProgressLines(run)
    lines.on_evaluation(50, Evaluation({"loss": 2.0, "ppl": 7.389, "bpb": 2.885, "share": 0.25, "labels": 4096.0}))
    lines.on_checkpoint("checkpoint-50")
    lines.on_end("stopped")
    evaluation, checkpoint, end = capsys.readouterr().out.splitlines()
    assert evaluation == "step 50/200   val 2.000 | share 0.25 | 2.88 bpb"
    assert str(run.folder / "checkpoints" / "checkpoint-50") in checkpoint
    assert "stopped" in end and "step 50" in end and str(run.folder) in end


def test_an_evaluation_is_followed_by_the_health_of_the_last_logged_step(
    make_run, record, capsys: pytest.CaptureFixture[str], no_terminal
) -> None:
    lines = ProgressLines(make_run(steps=50))
    lines.on_evaluation(0, Evaluation({"loss": 5.0}))
    lines.on_step(record(1, metrics={"norm_M": 7.0}))
    lines.on_step(record(2, metrics={"norm_M": 1.2345, "memory/alpha": 0.001}))
    lines.on_evaluation(2, Evaluation({"loss": 2.0}))
    before, _, _, after, health = capsys.readouterr().out.splitlines()
    assert (before, after) == ("step 0/50   val 5.000", "step 2/50   val 2.000")
    assert health.split(" | ") == ["            norm_M 1.23", "memory/alpha 0.001"]


def test_words_of_the_system_stand_in_the_line(make_run, capsys: pytest.CaptureFixture[str], no_terminal) -> None:
    class Terse(NamedSystem):
        name = "terse"

        def headline(self, evaluation: Evaluation) -> str:
            return f"as good as {evaluation.scalars['loss']}"

    run = make_run(steps=50)
    run.system = Terse(run.config)
    ProgressLines(run).on_evaluation(50, Evaluation({"loss": 2.0}))
    assert capsys.readouterr().out == "step 50/50  as good as 2.0\n"


def test_the_log_has_every_line_with_its_time(
    make_run, record, capsys: pytest.CaptureFixture[str], no_terminal
) -> None:
    run = make_run()
    lines = ProgressLines(run)
    lines.on_step(record(1))
    lines.on_checkpoint("checkpoint-1")
    lines.on_end("finished")
    ProgressLines(run).on_end("finished")
    logged = (run.folder / "training.log").read_text().splitlines()
    assert [text[21:] for text in logged] == capsys.readouterr().out.splitlines()
    assert all(len(text[:19].split("-")) == 3 and text[19:21] == "  " for text in logged)


def test_a_terminal_gets_a_bar_and_the_log_the_lines(
    make_run, record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run = make_run(step=10, steps=150)
    lines = ProgressLines(run)
    lines.on_start()
    for step in (11, 12):
        lines.on_step(record(step))
    lines.on_checkpoint("checkpoint-12")
    assert lines.bar is not None and (lines.bar.n, lines.bar.total) == (12, 150)
    lines.on_end("stopped")
    assert capsys.readouterr().out == ""
    assert "loss 2.5000" in terminal.getvalue() and "saved" in terminal.getvalue()
    logged = (run.folder / "training.log").read_text().splitlines()
    assert len(logged) == 4 and "step 12/150" in logged[1]


@pytest.mark.parametrize(
    ("step", "changes"),
    [(7, {}), (50_000, {"loss": 11.7654, "tok_s": 1_234_567.0}), (1, {"tok_s": 0.5, "grad_norm": None, "mfu": 0.412})],
)
@pytest.mark.parametrize("measured", [True, False])
def test_the_bar_fits_a_terminal_of_80_columns(
    make_run, record, monkeypatch: pytest.MonkeyPatch, step: int, changes: dict[str, Any], measured: bool
) -> None:
    """`measured`: whether the system's loss has nats per token, whose perplexity is then shown."""
    if not measured:
        changes = {**changes, "token_loss": None}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        lines = ProgressLines(make_run(steps=50_000))
        lines.on_start()
        lines.on_step(record(step, metrics={"norm_M": 1.0}, **changes))
        lines.on_end("stopped")
        shown = b""
        while b"stopped at" not in shown:
            shown += os.read(ours, 2**16)
    os.close(ours)
    bars = [text for text in re.split(r"[\r\n]+|\x1b\[A", shown.decode()) if "/50000 |" in text]
    assert bars and all(len(bar) <= 80 for bar in bars)
    (last,) = [bar for bar in bars if "ETA" in bar][-1:]
    assert last.startswith(f"{step}/50000 |")
    for name in (r"\| loss \d+\.\d{4} ", r" lr \d\.\d\de-\d\d ", r" [\d.]+[KM]? tok/s ", r" ETA \d+:\d\d:\d\d\s*$"):
        assert re.search(name, last), last
    bar = re.search(r"\|(.*)\|", last)
    assert bar is not None and len(bar[1]) >= (3 if measured else 10), "something of a bar is left"
    ppl = {2.5: "12.2", 11.7654: "129K"}[changes.get("loss", 2.5)]
    assert (f" ppl {ppl} " in last) is measured and ("ppl" in last) is measured


def test_the_bar_names_the_phase_of_several_and_a_perplexity_of_nats_alone(
    make_run, record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    run = make_run(steps=150)
    run.phases = Phases((run.phase, dataclasses.replace(run.phase, name="next")))
    lines = ProgressLines(run)
    lines.on_start()
    for changes, shown in (
        ({"loss": 3.0, "token_loss": 2.5}, "train  loss 3.0000  ppl 12.2  lr"),
        ({"loss": 3.0, "token_loss": None}, "train  loss 3.0000  lr"),
        ({"token_loss": 800.0}, "ppl inf  lr"),
        ({"token_loss": 60.0}, "ppl 1e+26  lr"),
    ):
        lines.on_step(record(1, **changes))
        assert lines.bar is not None and shown in lines.bar.desc
    lines.on_end("stopped")


@pytest.mark.parametrize("bar", ["None", "tqdm(total=3)"])
def test_a_terminal_that_closes_is_missed_by_nobody(bar: str) -> None:
    """A write to it is an input/output error; the run goes on, and ends with its own code."""
    ours, theirs = pty.openpty()
    script = (
        "import sys; from pipeline.runtime.exit import log_line\n"
        "from tqdm import tqdm; from pipeline.callbacks.progress import ProgressLines\n"
        f"lines = ProgressLines.__new__(ProgressLines); lines.bar = {bar}; lines.watched = True\n"
        "print('ready', flush=True); sys.stdin.readline(); lines._print('saved'); log_line('stopped'); sys.exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    # To the end of the line: a terminal that closes sooner closes in the midst of its write.
    while b"ready\r\n" not in seen:
        seen += os.read(ours, 100)
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 7


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.9, "0:00:59"), (60, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00"),
     (float("inf"), "?"), (float("nan"), "?")],
)  # fmt: skip
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_more_is_shown_when_it_is_asked_for(
    make_run, record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for verbose in (False, True):
        lines = ProgressLines(make_run(report__verbose=verbose))
        lines.on_start()
        lines.on_step(record(step=5, metrics={"ce": 1.25, "vb": 2.0}))
        lines.on_samples(5, {"sheet": "MKLV\nACDE\n", "numbers": {"x": [1.0, float("nan")]}})
        lines.on_end("finished")
        shown = terminal.getvalue()
        assert ("ce 1.25  vb 2" in shown) == verbose
        assert ("sheet:\nMKLV\nACDE" in shown and 'numbers:\n{"x": [1.0, null]}' in shown) == verbose
    written = (lines.run.folder / "training.log").read_text()
    assert "ce 1.25  vb 2" in written
