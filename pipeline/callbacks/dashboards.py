"""TensorBoard and Weights & Biases, when asked for."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.callbacks.samples import without
from pipeline.errors import UserError
from pipeline.files.output import writing
from pipeline.run import Run
from pipeline.system import Evaluation


def _scalars(record: StepRecord) -> dict[str, float]:
    values = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/tok_s": record.tok_s,
        "train/peak_memory": record.peak_memory,
        "train/mfu": record.mfu,
        "train/loss_scale": record.loss_scale,
        **record.metrics,
    }
    return {key: float(value) for key, value in values.items() if value is not None}


def flat(ablations: Mapping[str, Evaluation]) -> dict[str, float]:
    """The numbers of all ablations by one name each."""
    found = ablations.items()
    return {f"{without(part)}/{name}": value for part, of in found for name, value in of.scalars.items()}


def _wandb_id(run: Run) -> str:
    """That of the W&B run, kept in the run directory: a resume and the next phase go on with it. Raises RankError."""
    path = run.folder / "wandb_id"
    if run.progress.step and path.is_file():
        return path.read_text().strip()
    with writing(path):
        path.write_text(secrets.token_hex(8) + "\n")
    return path.read_text().strip()


class TensorBoard(Callback):
    """Events under OUT/tensorboard."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.progress.step + 1)

    def on_step(self, record: StepRecord) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        for name, value in evaluation.scalars.items():
            self.writer.add_scalar(f"val/{name}", value, step)

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        for name, value in flat(ablations).items():
            self.writer.add_scalar(name, value, step)

    def on_end(self, status: str) -> None:
        self.writer.close()


class WeightsAndBiases(Callback):
    """Logs to the W&B project that the config names."""

    def __init__(self, run: Run) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise UserError("--report.wandb needs the wandb package: pip install -e '.[wandb]'") from None
        self.session: Any = wandb.init(
            project=run.config.report.wandb,
            name=run.folder.name,
            dir=str(run.folder),
            config=dataclasses.asdict(run.config),
            id=_wandb_id(run),
            resume="allow",
        )

    def on_step(self, record: StepRecord) -> None:
        self.session.log(_scalars(record), step=record.step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.session.log({f"val/{name}": value for name, value in evaluation.scalars.items()}, step=step)

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        self.session.log(flat(ablations), step=step)

    def on_end(self, status: str) -> None:
        self.session.finish(exit_code=0 if status in ("finished", "running") else 1)
