"""The evaluation section of RunConfig: what a run measures of its model beside the training loss."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError, shown


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation during and after training."""

    steps: int = 8
    """Held-out sequences per row that one evaluation reads."""
    batch_size: int = 0
    """Rows per data rank; 0: as in training."""
    gap_every: int = 0
    """Steps between measurements of gap closed, of a system with a memory, each with an evaluation and at the end too;
    0: never. They cost up to seven evaluations' passes (docs/gap_closed.md)."""
    full_length: int = 0
    """Tokens that the full attention of gap closed sees; 0: those that a pretrained backbone was trained at."""
    path: tuple[str, ...] = ()
    """Held-out documents of their own, NAME=PATH each: a file, folder or glob as for --data.path. Loss and bits per
    byte of each stand under its name."""
    tokens: tuple[str, ...] = ()
    """Held-out token files, NAME=FILE each, as for --data.tokens; the other flags of token files hold for them too."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness by name, of those that read and do not generate text (needs the `eval` extra).
    Their scores are part of an evaluation."""
    tasks_every: int = 0
    """Steps between scores of the tasks, each with an evaluation and at the end too; 0: at the end only."""
    task_path: str | None = None
    """Folder of further tasks, in the harness's YAML form; one of theirs may replace one of the harness's."""
    task_limit: int = 0
    """First documents of each task that are scored; 0: all."""
    best: str | None = None
    """Number of the held-out evaluation, such as loss, by which the best checkpoint is kept: the one with the lowest.
    It is saved at its evaluation, and checkpoints/best names it."""
    patience: int = 0
    """Evaluations in a row that are no better than the best before them, after which the phase ends; 0: it goes on."""

    def __post_init__(self) -> None:
        if self.patience and self.best is None:
            raise UserError(
                f"--evaluation.patience {shown(self.patience)}: nothing says what is better: name a number of the"
                " held-out evaluation, --evaluation.best loss"
            )
        if self.tasks:
            return
        for flag, value in (
            ("tasks-every", self.tasks_every), ("task-path", self.task_path), ("task-limit", self.task_limit)
        ):  # fmt: skip
            if value:
                raise UserError(
                    f"--evaluation.{flag} {shown(value)}: there are no tasks: name some, --evaluation.tasks"
                )
