"""OUT/samples: what was drawn from the model, and tables of evaluations, a file each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.callbacks.base import Callback
from pipeline.callbacks.continuations import draw_continuations
from pipeline.evaluation_result import Continuations
from pipeline.files.output import writing
from pipeline.run import Run
from pipeline.system import Evaluation, Sample


class SampleFiles(Callback):
    """Writes OUT/samples/NAME-STEP.txt for a text and NAME-STEP.json for anything else; where a run draws pictures,
    also OUT/NAME_stepSTEP.png of continuations. Raises RankError."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder = run, run.folder / "samples"

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.on_samples(step, {**evaluation.samples, **evaluation.tables})

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        for part, evaluation in ablations.items():
            self.on_samples(step, {f"{without(part)}/{name}": text for name, text in evaluation.samples.items()})

    def on_samples(self, step: int, samples: Mapping[str, Sample]) -> None:
        write_samples(samples, self.folder, f"-{step}")
        for name, sample in samples.items():
            if isinstance(sample, Continuations) and self.run.config.report.plots:
                path = self.run.folder / f"{name}_step{step}.png"
                with writing(path):
                    draw_continuations(sample, path, f"{self.run.config.recipe}, after step {step}")


def without(part: str) -> str:
    """What is left out of a model, as a folder's name."""
    return f"without_{part.replace(' ', '_')}"


def write_samples(samples: Mapping[str, Sample], folder: Path, ending: str = "") -> None:
    """A file each, by name; `ending` stands behind the name. Replaces what is there; raises RankError."""
    for name, sample in samples.items():
        is_text = isinstance(sample, (str, Continuations))
        path = folder / f"{name}{ending}.{'txt' if is_text else 'json'}"
        content = str(sample) if is_text else json.dumps(finite(sample), ensure_ascii=False, indent=1)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # What a model draws need not be text: half of a surrogate pair cannot be encoded.
            path.write_text(content.rstrip("\n") + "\n", encoding="utf-8", errors="backslashreplace")


def finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
