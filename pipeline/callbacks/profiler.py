"""A torch.profiler trace of a few steps."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from pipeline.callbacks.base import Callback
from pipeline.host.hardware import on_gpu
from pipeline.run import Run


class Profiler(Callback):
    """Traces `--profile N` steps, after two of warm-up, into OUT/profile; every rank writes its own."""

    def __init__(self, run: Run) -> None:
        activities = [ProfilerActivity.CPU]
        if on_gpu():
            activities.append(ProfilerActivity.CUDA)
        folder = run.folder / "profile"
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=1, warmup=1, active=run.config.profile, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(folder), worker_name=f"rank{run.topology.rank}"),
        )

    def on_start(self) -> None:
        self.profiler.start()

    def after_step(self, step: int) -> None:
        self.profiler.step()

    def on_end(self, status: str) -> None:
        self.profiler.stop()
