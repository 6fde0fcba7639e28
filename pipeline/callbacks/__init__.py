"""What watches a run: progress, metrics, samples, dashboards, plots, profiling."""

from __future__ import annotations

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.parallel.collectives import shared_errors
from pipeline.run import Run

__all__ = ["Callback", "StepRecord", "create_callbacks", "local_callbacks"]


def create_callbacks(run: Run) -> list[Callback]:
    """The callbacks of a run, in the order they are called. Collective; raises UserError."""
    with shared_errors(run.topology):
        return local_callbacks(run)


def local_callbacks(run: Run) -> list[Callback]:
    """Those of this rank: a profiler everywhere, those that write on rank 0 alone."""
    from pipeline.callbacks.dashboards import TensorBoard, WeightsAndBiases
    from pipeline.callbacks.metrics import MetricsFile
    from pipeline.callbacks.plots import Plots
    from pipeline.callbacks.profiler import Profiler
    from pipeline.callbacks.progress import ProgressLines
    from pipeline.callbacks.samples import SampleFiles
    from pipeline.callbacks.spikes import SpikeFile

    callbacks: list[Callback] = []
    if run.config.profile:
        callbacks.append(Profiler(run))
    if run.is_main:
        callbacks += [MetricsFile(run), ProgressLines(run), SampleFiles(run), SpikeFile(run)]
        if run.config.report.tensorboard:
            callbacks.append(TensorBoard(run))
        if run.config.report.wandb is not None:
            callbacks.append(WeightsAndBiases(run))
        if run.config.report.plots:
            callbacks.append(Plots(run))
    return callbacks
