"""Who watches: rank 0 writes, every rank profiles, and what was not asked for is not there."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.callbacks import local_callbacks
from pipeline.callbacks.profiler import Profiler
from pipeline.parallel.topology import Topology


def names(run) -> list[str]:
    return [type(callback).__name__ for callback in local_callbacks(run)]


def test_rank_0_writes(make_run) -> None:
    assert names(make_run()) == ["MetricsFile", "ProgressLines", "SampleFiles", "SpikeFile", "Plots"]
    assert names(make_run(report__plots=False)) == ["MetricsFile", "ProgressLines", "SampleFiles", "SpikeFile"]
    watching = ["MetricsFile", "ProgressLines", "SampleFiles", "SpikeFile", "TensorBoard", "Plots"]
    assert names(make_run(report__tensorboard=True)) == watching


def test_other_ranks_write_nothing(make_run) -> None:
    run = make_run(topology=Topology(rank=1, world=2), report__tensorboard=True)
    assert names(run) == []
    assert list(run.folder.iterdir()) == []


def test_every_rank_profiles_when_asked(make_run) -> None:
    assert names(make_run(topology=Topology(rank=1, world=2), profile=2)) == ["Profiler"]
    assert names(make_run(profile=2))[0] == "Profiler"


def test_plots_are_drawn_from_rows_that_are_already_written(make_run) -> None:
    order = names(make_run())
    assert order.index("MetricsFile") < order.index("Plots")


def profile(run, steps: int) -> list[Path]:
    profiler = Profiler(run)
    profiler.on_start()
    for step in range(1, steps + 1):
        torch.ones(4) @ torch.ones(4)
        profiler.after_step(step)
    profiler.on_end("finished")
    folder = run.folder / "profile"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_profile_is_a_trace_of_each_rank(make_run) -> None:
    (trace,) = profile(make_run(profile=1, topology=Topology(rank=1, world=2)), steps=4)
    assert trace.name.startswith("rank1") and "aten::" in trace.read_text()


def test_a_run_shorter_than_its_profile_still_ends(make_run) -> None:
    profile(make_run(profile=5), steps=1)
