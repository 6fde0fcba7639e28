"""metrics.jsonl: strict JSON, one row per logged step or evaluation, and each step once however often a run resumes."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.callbacks.metrics import MetricsFile, perplexity, read_rows
from pipeline.system import Evaluation
from tests.callbacks.conftest import CountingSystem, NamedSystem

TRAIN = {
    "mode", "step", "phase", "phase_step", "loss", "ppl", "lr", "grad_norm", "tok_s", "tokens", "elapsed",
    "peak_memory", "data_wait",
}  # fmt: skip


def strict_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows as a reader sees them that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_train_row_holds_what_is_promised(make_run, record) -> None:
    run = make_run()
    MetricsFile(run).on_step(
        record(3, loss=1.2345678901234567, mfu=0.25, data_wait=0.125, metrics={"norm_M": 1.5, "memory/alpha": 0.001})
    )
    (row,) = strict_rows(run.folder)
    assert set(row) == TRAIN | {"mfu", "norm_M", "memory/alpha"}
    assert (row["mode"], row["step"], row["tokens"], row["elapsed"]) == ("train", 3, 300, 6.0)
    assert row["loss"] == 1.2345678901234567
    assert row["ppl"] == math.exp(row["loss"]) and row["data_wait"] == 0.125
    assert (row["lr"], row["grad_norm"], row["tok_s"]) == (3e-4, 0.75, 4096.0)
    assert (row["peak_memory"], row["mfu"], row["norm_M"], row["memory/alpha"]) == (3 * 2**29, 0.25, 1.5, 0.001)


def test_rows_say_the_phase_and_the_step_in_it(make_run, record) -> None:
    run = make_run(step=7)
    run.progress.enter("second")
    file = MetricsFile(run)
    run.progress.step = 9
    file.on_step(record(9))
    file.on_evaluation(9, Evaluation({"loss": 2.0}))
    assert [(row["mode"], row["step"], row["phase"], row["phase_step"]) for row in strict_rows(run.folder)] == [
        ("train", 9, "second", 2), ("val", 9, "second", 2),
    ]  # fmt: skip


def test_rows_say_the_epoch_of_a_system_that_counts_them(make_run, record) -> None:
    run = make_run(step=7)
    run.system = CountingSystem(run.config)
    run.progress.enter("second")
    file = MetricsFile(run)
    file.on_step(record(9))
    file.on_evaluation(13, Evaluation({"loss": 2.0}))
    assert [row["epoch"] for row in strict_rows(run.folder)] == [0.25, 0.75], "counted from the start of the phase"
    assert set(strict_rows(run.folder)[0]) == TRAIN | {"mfu", "epoch"}


def test_an_ablation_has_a_row_for_each_part_that_was_left_out(make_run) -> None:
    run = make_run(step=4)
    file = MetricsFile(run)
    file.on_start()
    ablations = {"one part": Evaluation({"loss": 2.0}), "other": Evaluation({"loss": 3.0, "ppl": math.inf})}
    for _ in range(2):  # at the step where a run begins, one row is enough
        file.on_ablations(4, ablations)
    rows = strict_rows(run.folder)
    assert [(row["mode"], row["without"], row["step"], row["loss"]) for row in rows] == [
        ("ablate", "one part", 4, 2.0), ("ablate", "other", 4, 3.0),
    ]  # fmt: skip
    assert rows[1]["ppl"] is None and rows[0]["tokens"] == 400
    assert read_rows(run.folder / "metrics.jsonl") == rows
    file.on_ablations(6, ablations)
    file.on_ablations(8, ablations)
    assert [row["step"] for row in strict_rows(run.folder)] == [4, 4, 6, 6, 8, 8]


def test_a_system_compares_its_ablations_in_one_row(make_run) -> None:
    run = make_run(step=4)

    class Comparing(NamedSystem):
        def ablations(self, model: Any, phase: Any, sync_point: Any) -> dict[str, Evaluation]:
            raise AssertionError("not asked")

        def ablation_summary(self, ablations: Any) -> dict[str, float]:
            return {"gap": ablations["off"].scalars["loss"] - ablations["nothing"].scalars["loss"]}

    run.system = Comparing(run.config)
    file = MetricsFile(run)
    file.on_start()
    for _ in range(2):  # at the step where a run begins, one row is enough
        file.on_ablations(4, {"nothing": Evaluation({"loss": 2.0}), "off": Evaluation({"loss": 2.5})})
    rows = strict_rows(run.folder)
    assert [row["mode"] for row in rows] == ["ablate", "ablate", "ablate_summary"]
    assert rows[-1] | {"elapsed": 0} == {
        "mode": "ablate_summary", "step": 4, "phase": "train", "phase_step": 4, "gap": 0.5, "tokens": 400, "elapsed": 0,
    }  # fmt: skip
    assert read_rows(run.folder / "metrics.jsonl") == rows


def test_types_of_a_train_row(make_run, record) -> None:
    run = make_run()
    MetricsFile(run).on_step(record())
    (row,) = strict_rows(run.folder)
    for name in ("step", "phase_step", "tokens", "peak_memory"):
        assert type(row[name]) is int
    for name in ("loss", "ppl", "lr", "grad_norm", "tok_s", "elapsed"):
        assert type(row[name]) is float
    assert row["mfu"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(make_run, record, value: float) -> None:
    run = make_run()
    file = MetricsFile(run)
    file.on_step(record(loss=value, grad_norm=value, metrics={"norm_M": value}))
    file.on_evaluation(1, Evaluation({"loss": value, "ppl": 3.0}))
    train, val = strict_rows(run.folder)
    assert (train["loss"], train["grad_norm"], train["norm_M"]) == (None, None, None)
    assert (val["loss"], val["ppl"]) == (None, 3.0)


def test_a_row_has_a_loss_scale_where_the_model_computes_in_float16(make_run, record) -> None:
    run = make_run()
    MetricsFile(run).on_step(record(loss_scale=32768.0))
    (row,) = strict_rows(run.folder)
    assert set(row) == TRAIN | {"mfu", "loss_scale"} and row["loss_scale"] == 32768.0


def test_a_skipped_update_has_no_gradient_norm(make_run, record) -> None:
    run = make_run()
    MetricsFile(run).on_step(record(grad_norm=None))
    assert strict_rows(run.folder)[0]["grad_norm"] is None


def test_a_val_row_holds_the_scalars_and_where_the_run_stands(make_run) -> None:
    run = make_run(step=4)
    MetricsFile(run).on_evaluation(
        4, Evaluation({"loss": 2.0, "ppl": math.exp(2), "bpb": 1.5, "memory_off/loss": 2.25})
    )
    (row,) = strict_rows(run.folder)
    place = {"mode": "val", "step": 4, "phase": "train", "phase_step": 4}
    expected = {**place, "loss": 2.0, "ppl": math.exp(2), "bpb": 1.5, "memory_off/loss": 2.25}
    assert row == {**expected, "tokens": 400, "elapsed": 8.0}


def test_rows_are_on_disk_as_soon_as_they_are_written(make_run, record) -> None:
    run = make_run()
    file = MetricsFile(run)
    for step in range(1, 4):
        file.on_step(record(step))
        assert [row["step"] for row in read_rows(file.path)] == list(range(1, step + 1))


def test_a_resume_drops_the_rows_of_steps_that_are_run_again(make_run, record) -> None:
    file = MetricsFile(make_run())
    for step in range(1, 6):
        file.on_step(record(step))
        file.on_evaluation(step, Evaluation({"loss": 2.0}))
    run = make_run(step=3)
    resumed = MetricsFile(run)
    resumed.on_start()
    resumed.on_step(record(4, loss=9.0))
    rows = strict_rows(run.folder)
    assert [(row["mode"], row["step"]) for row in rows] == [
        ("train", 1), ("val", 1), ("train", 2), ("val", 2), ("train", 3), ("val", 3), ("train", 4),
    ]  # fmt: skip
    assert rows[-1]["loss"] == 9.0


def test_a_resume_leaves_the_rows_before_it_as_they_were(make_run, record) -> None:
    run = make_run(step=2)
    file = MetricsFile(run)
    file.on_step(record(1, loss=1.2345678901234567, grad_norm=None))
    file.on_evaluation(2, Evaluation({"loss": math.nan}))
    before = strict_rows(run.folder)
    file.on_start()
    assert strict_rows(run.folder) == before


def test_a_start_without_a_checkpoint_drops_every_row(make_run, record) -> None:
    """A run that stopped before its first checkpoint starts anew, its evaluation before the first step included."""
    run = make_run(step=0)
    file = MetricsFile(run)
    file.on_evaluation(0, Evaluation({"loss": 5.0}))
    file.on_step(record(1))
    file.on_start()
    file.on_evaluation(0, Evaluation({"loss": 5.0}))
    assert [(row["mode"], row["step"]) for row in strict_rows(run.folder)] == [("val", 0)]


@given(st.data())
def test_a_file_cut_off_by_a_crash_reads_up_to_its_last_whole_row(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    rows = [{"mode": "train", "step": step, "loss": 1 / step} for step in range(1, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    length = data.draw(st.integers(0, len(text)))
    path.write_text(text[:length])
    # A row without the end of its line is whole.
    whole = (text[:length] + ("\n" if text[length : length + 1] == "\n" else "")).count("\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_rows(path) == rows[:whole]
    assert len(caught) == (0 if text[:length].endswith(("\n", "}")) or not length else 1)


def test_a_resume_after_a_crash_leaves_whole_rows_alone(make_run, record) -> None:
    run = make_run(step=2)
    file = MetricsFile(run)
    for step in (1, 2):
        file.on_step(record(step))
    with file.path.open("a") as handle:
        handle.write('{"mode": "train", "step": 3, "lo')
    file.on_start()
    file.on_step(record(3))
    assert [row["step"] for row in strict_rows(run.folder)] == [1, 2, 3]


SPOILT = {
    "a block of NUL": b"\0" * 512,
    "NUL before a row": b'\0\0{"mode": "train", "step": 2}',
    "a blank line": b"",
    "spaces": b"   ",
    "a comment": b"# restarted here",
    "half a row": b'{"mode": "train", "step": 2, "lo',
    "two rows in one": b'{"mode": "train", "step": 2}{"mode": "train", "step": 3}',
    "a list": b'["train", 2]',
    "a number": b"2",
    "no mode": b'{"step": 2, "loss": 1.0}',
    "no step": b'{"mode": "train", "loss": 1.0}',
    "a step that is none": b'{"mode": "train", "step": "2"}',
    "a step that is true": b'{"mode": "train", "step": true}',
    "a step beyond all": b'{"mode": "train", "step": 1' + b"0" * 40 + b"}",
    "no text": b'{"mode": "train", "step": 2, "loss": "\xff"}',
    "an infinite number": b'{"mode": "train", "step": 2, "loss": 1e999}',
    "NaN": b'{"mode": "train", "step": 2, "loss": NaN}',
    "a number that no float holds": b'{"mode": "train", "step": 2, "loss": 1' + b"0" * 400 + b"}",
    "more digits than are read": b'{"mode": "train", "step": 2, "loss": ' + b"9" * 5000 + b"}",
    "a word in place of a number": b'{"mode": "train", "step": 2, "loss": "high"}',
    "a list in a row": b'{"mode": "train", "step": 2, "loss": [1.0]}',
    "nesting without end": b'{"mode": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("line", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_line_is_left_out_with_one_warning(make_run, record, line: bytes) -> None:
    """Once it stopped a resume although the checkpoint was whole."""
    run = make_run(step=3)
    file = MetricsFile(run)
    for step in (1, 3):
        file.on_step(record(step))
    first, second = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(first + line + b"\n" + second)
    with pytest.warns(UserWarning, match=rf"{file.path}: 1 of 3 lines are no rows and are left out") as caught:
        file.on_start()
    assert len(caught) == 1
    # The file is clean from then on.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row["step"] for row in read_rows(file.path)] == [1, 3]
        file.on_step(record(4))
        assert [row["step"] for row in strict_rows(run.folder)] == [1, 3, 4]


def test_several_spoilt_lines_make_one_warning(make_run, record) -> None:
    run = make_run(step=2)
    file = MetricsFile(run)
    file.on_evaluation(2, Evaluation({"loss": 2.0}))
    with file.path.open("ab") as handle:
        handle.write(b"\n".join([*SPOILT.values(), b""]))
    with pytest.warns(UserWarning, match=f"{len(SPOILT)} of {len(SPOILT) + 1} lines") as caught:
        assert [row["step"] for row in read_rows(file.path)] == [2]
    assert {str(warning.message) for warning in caught} == {str(caught[0].message)}


def test_a_new_run_has_no_file_until_its_first_row(make_run, record) -> None:
    run = make_run()
    file = MetricsFile(run)
    file.on_start()
    assert not file.path.exists()
    file.on_step(record())
    assert len(strict_rows(run.folder)) == 1


@pytest.mark.parametrize("loss, expected", [(0.0, 1.0), (2.0, math.exp(2)), (1e4, math.inf), (math.inf, math.inf)])
def test_perplexity(loss: float, expected: float) -> None:
    assert perplexity(loss) == expected


def test_the_perplexity_of_an_unknown_loss_is_unknown() -> None:
    assert math.isnan(perplexity(math.nan))


def test_an_evaluation_that_is_made_again_has_one_row(make_run) -> None:
    """A crash between the row and run.json leaves an evaluation that the next start makes again."""
    run = make_run(step=2)
    file = MetricsFile(run)
    for step in (0, 2):
        file.on_evaluation(step, Evaluation({"loss": 2.0}))
    after = MetricsFile(run)
    after.on_start()
    after.on_evaluation(2, Evaluation({"loss": 3.0}))
    after.on_evaluation(4, Evaluation({"loss": 1.0}))
    assert [(row["step"], row["loss"]) for row in read_rows(file.path)] == [(0, 2.0), (2, 3.0), (4, 1.0)]


def test_perplexity_is_that_of_the_tokens_alone(make_run, record) -> None:
    run = make_run()
    file = MetricsFile(run)
    for number, token_loss in enumerate((2.0, 1.5, None), start=1):
        file.on_step(record(number, loss=2.0, token_loss=token_loss))
    assert [row["ppl"] for row in strict_rows(run.folder)] == [math.exp(2.0), math.exp(1.5), None]
