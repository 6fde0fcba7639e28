"""Which checkpoints a save leaves: the newest, and those at multiples of an interval."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.manifest import (
    BEST,
    LATEST,
    MANIFEST,
    complete_checkpoints,
    point,
    pointed,
    prune_old,
    step_of,
)  # fmt: skip
from pipeline.checkpoint.restore import read_progress
from pipeline.checkpoint.save import Saver
from pipeline.config import replace
from pipeline.run import Run
from tests.checkpoint.small_runs import save, steps

STEPS = st.sets(st.integers(0, 60), min_size=1, max_size=12)


def pruned(
    present: set[int], damaged: set[int], keep: int, saved: int, every: int, start: bool
) -> tuple[set[int], set[int]]:
    """The steps that are complete afterwards, and those that may be removed; `damaged` lack a manifest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in present | damaged:
            (folder / f"checkpoint-{step}").mkdir()
        for step in present - damaged:
            (folder / f"checkpoint-{step}" / MANIFEST).write_text("{}")
        hidden = prune_old(folder, keep, saved, every, start=start)
        assert all((folder / f"checkpoint-{step}").is_dir() for step in damaged)
        gone = {int(path.name.split("-")[1].removesuffix(".removed")) for path in hidden}
        assert all(path.is_dir() and path.name.startswith(".") for path in hidden)
        return {step_of(path) for path in complete_checkpoints(folder)}, gone


@given(STEPS, STEPS, st.integers(1, 5), st.integers(1, 60), st.integers(0, 12), st.booleans())
def test_the_newest_the_multiples_and_the_start_stay_and_nothing_else(
    present: set[int], damaged: set[int], keep: int, saved: int, every: int, start: bool
) -> None:
    complete = present - damaged
    ours = sorted(step for step in complete if step <= saved)
    later = complete - set(ours)
    multiples = {step for step in ours if every and step % every == 0}
    left, gone = pruned(present, damaged, keep, saved, every, start)
    assert left == later | set(ours[-keep:]) | multiples | ({0} & set(ours) if start else set())
    assert gone == complete - left


@given(STEPS, st.integers(1, 5), st.integers(0, 12), st.booleans())
def test_pruning_after_every_save_leaves_what_pruning_once_at_the_end_does(
    present: set[int], keep: int, every: int, start: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in sorted(present):
            (folder / f"checkpoint-{step}").mkdir()
            (folder / f"checkpoint-{step}" / MANIFEST).write_text("{}")
            for path in prune_old(folder, keep, step, every, start=start):
                shutil.rmtree(path)
        left = {step_of(path) for path in complete_checkpoints(folder)}
    assert left == pruned(present, set(), keep, max(present), every, start)[0]


@pytest.mark.parametrize("every, left", [(0, [250, 300]), (100, [100, 200, 250, 300]), (150, [150, 250, 300])])
def test_a_run_keeps_its_multiples_beside_the_newest(make_run, every: int, left: list[int]) -> None:
    run = make_run(keep=2, keep_every=every)
    for step in (50, 100, 150, 200, 250, 300):
        save(run, step)
    assert steps(run) == left


@pytest.mark.parametrize("at_start, left", [(True, [0, 250, 300]), (False, [250, 300])])
def test_the_initial_weights_of_save_at_start_are_kept(make_run, at_start: bool, left: list[int]) -> None:
    run = make_run(keep=2)
    run.config = replace(run.config, save_at_start=at_start)
    for step in (0, 200, 250, 300):
        save(run, step)
    assert steps(run) == left


def test_the_best_is_kept_until_another_one_is(make_run) -> None:
    run = make_run(keep=1)
    folder = run.folder / "checkpoints"
    for step, best in ((50, 0), (100, 100), (150, 100), (200, 100)):
        run.progress.best_step = best
        save(run, step)
    assert steps(run) == [100, 200] and pointed(folder / BEST) == folder / "checkpoint-100"
    run.progress.best_step = 250
    save(run, 250)
    assert steps(run) == [250] and (folder / BEST).read_text() == "checkpoint-250\n"


@settings(max_examples=25)
@given(STEPS, st.integers(1, 5), st.integers(0, 12), st.integers(0, 60))
def test_the_best_takes_the_place_of_no_other(present: set[int], keep: int, every: int, best: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in present:
            (folder / f"checkpoint-{step}").mkdir()
            (folder / f"checkpoint-{step}" / MANIFEST).write_text("{}")
        point(folder / BEST, f"checkpoint-{best}")
        prune_old(folder, keep, 60, every)
        left = {step_of(path) for path in complete_checkpoints(folder)}
    assert left == pruned(present, set(), keep, 60, every, False)[0] | ({best} & present)


@pytest.mark.parametrize("keep, left", [(1, [100, 160, 200]), (2, [100, 160, 180, 200])])
def test_the_ends_of_earlier_phases_are_kept_beside_the_newest(make_run, keep: int, left: list[int]) -> None:
    run = make_run(keep=keep)
    run.progress.phase = "A"
    for step in (50, 100):
        save(run, step)
    run.progress.enter("B")
    for step in (150, 160):
        save(run, step)
    assert steps(run) == ([100, 160] if keep == 1 else [100, 150, 160])
    run.progress.enter("C")
    # A start goes on from what the checkpoint knows.
    run.progress = read_progress(save(run, 180))
    assert run.progress.phase_ends == (100, 160)
    save(run, 200)
    assert steps(run) == left


@given(STEPS, st.integers(1, 5), st.integers(1, 60), st.sets(st.integers(0, 60), max_size=3))
def test_ends_of_phases_take_the_place_of_no_other(present: set[int], keep: int, saved: int, ends: set[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in present:
            (folder / f"checkpoint-{step}").mkdir()
            (folder / f"checkpoint-{step}" / MANIFEST).write_text("{}")
        prune_old(folder, keep, saved, ends=ends)
        left = {step_of(path) for path in complete_checkpoints(folder)}
    assert left == pruned(present, set(), keep, saved, 0, False)[0] | (ends & present)


def judged(run: Run, step: int, loss: float) -> Path:
    """A checkpoint that knows of an evaluation at its step."""
    run.progress.step = step
    run.progress.judge("loss", loss)
    return save(run, step)


def went_back(run: Run, checkpoint: Path) -> str | None:
    """What a start says that goes on from a checkpoint; `best` is mended."""
    run.progress = read_progress(checkpoint)
    run.chosen.clear()
    saver = Saver(run)
    saver.mend_best()
    saver.close()
    return run.chosen.get("best")


def test_best_is_mended_where_a_start_was_cut_off_or_a_run_went_back(make_run) -> None:
    run = make_run(keep=9)
    folder = run.folder / "checkpoints"
    early = save(run, 20)
    first, second, third = (judged(run, step, loss) for step, loss in ((50, 3.0), (100, 2.0), (150, 2.5)))
    assert went_back(run, first) is None and pointed(folder / BEST) == first
    (folder / BEST).unlink()  # a start was cut off
    assert went_back(run, third) is None and pointed(folder / BEST) == second
    assert went_back(run, early) == "checkpoints/best names none: no evaluation up to step 20 has found a best"
    assert not (folder / BEST).exists()
    assert went_back(run, early) is None, "nothing is removed, and nothing said"


def test_best_names_no_checkpoint_of_steps_that_were_abandoned(make_run) -> None:
    run = make_run(keep=9)
    folder = run.folder / "checkpoints"
    early = save(run, 20)
    judged(run, 50, 3.0)
    later = save(run, 100)
    went_back(run, early)
    again = judged(run, 50, 4.0)  # the same step, with other flags
    assert pointed(folder / BEST) == again
    assert went_back(run, later) == f"checkpoints/best names none: {again} is another one than the best up to step 100"
    assert not (folder / BEST).exists()
    (again / "trainer_state.json").write_text("{}")
    assert "trainer_state.json" in str(went_back(run, later)), "damaged"
    shutil.rmtree(again)
    said = f"checkpoints/best names none: checkpoint-50, the best up to step 100, is not in {folder}"
    assert went_back(run, later) == said


def test_a_run_that_goes_on_from_another_ones_checkpoint_says_that_the_best_is_not_here(make_run, tmp_path) -> None:
    run = make_run()
    judged(run, 50, 3.0)
    later = judged(run, 100, 3.5)
    run.config = replace(run.config, output_dir=tmp_path / "other")
    said = went_back(run, later)
    assert said is not None and said.startswith("checkpoints/best names none: checkpoint-50, ")
    assert not (tmp_path / "other").exists(), "nothing is made for it"
    run.progress.step = 150
    assert not run.progress.judge("loss", 3.2) and run.progress.judge("loss", 2.9)


def test_the_best_of_a_phase_stays_until_the_next_one_has_one(make_run) -> None:
    run = make_run(keep=9)
    first = judged(run, 50, 3.0)
    judged(run, 100, 3.5)
    run.progress.enter("next")
    between = save(run, 120)
    assert judged(run, 150, 9.0) == pointed(run.folder / "checkpoints" / BEST)
    assert went_back(run, between) is None and pointed(run.folder / "checkpoints" / BEST) == first


@pytest.mark.parametrize("text", ["", "checkpoint-", "../checkpoint-5", "checkpoint-5/..", "/etc"])
def test_a_file_that_names_no_checkpoint_is_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / BEST).write_text(text)
    assert pointed(tmp_path / BEST) == tmp_path / BEST and pointed(tmp_path) == tmp_path


@pytest.mark.parametrize("name", [LATEST, BEST])
def test_a_pointer_is_also_meant_by_the_name_of_one_file(tmp_path: Path, name: str) -> None:
    single = tmp_path / f"{name}.pt"
    assert pointed(single) == single, "nothing is there"
    point(tmp_path / name, "checkpoint-7")
    assert pointed(single) == pointed(tmp_path / name) == tmp_path / "checkpoint-7"
    assert pointed(tmp_path / "other.pt") == tmp_path / "other.pt"
    single.write_bytes(b"a file of its own")
    assert pointed(single) == single
