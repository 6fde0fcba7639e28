"""What a config asks of a run at an interval, beside what its system can do."""

from __future__ import annotations

from pipeline.capabilities import Ablates, ClosesGap, CountsEpochs, Samples, ScoresText
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.system import System


def check_intervals(config: RunConfig, system: System) -> None:
    """Raises UserError where the config asks for what the system cannot do."""
    evaluation, epochs = config.evaluation, config.epochs
    counts = isinstance(system, CountsEpochs)
    for flag, given, can, lacks in (
        ("--sample-every", config.sample_every, isinstance(system, Samples), "draws no samples"),
        ("--ablate-every", config.ablate_every, isinstance(system, Ablates), "has no ablations"),
        (
            "--evaluation.gap-every",
            evaluation.gap_every,
            isinstance(system, ClosesGap),
            "has no memory behind an attention window",
        ),
        ("--epochs", epochs.train, counts, "counts no epochs"),
        ("--epochs.save", epochs.save, counts, "counts no epochs"),
        ("--epochs.evaluate", epochs.evaluate, counts, "counts no epochs"),
        ("--epochs.sample", epochs.sample, counts, "counts no epochs"),
        ("--epochs.sample", epochs.sample, isinstance(system, Samples), "draws no samples"),
        ("--evaluation.tasks", " ".join(evaluation.tasks), isinstance(system, ScoresText), "reads no text"),
    ):
        if given and not can:
            value = f"{given:g}" if isinstance(given, float) else given
            raise UserError(f"{flag} {value}: {config.recipe} {lacks}: leave it out")
