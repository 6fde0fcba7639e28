"""Small runs of the system on documents that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig, replace
from pipeline.recipes.cvfp import cvfp_tiny

WORDS = (
    "the of and a to in is you that it he was for on are as with his they I at be this have from or one had by".split()
)
DOCUMENTS = 26


def documents(folder: Path, count: int = DOCUMENTS) -> Path:
    """A folder of short documents of 4 to 20 bytes and more."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        words = random.choice(WORDS, size=random.integers(2, 8))
        (folder / f"{number:02d}.txt").write_text(" ".join([*words, str(number)]))
    return folder


def small(folder: Path, **changes: Any) -> RunConfig:
    """A run of two blocks of width 8 on such documents, in `folder`: 3 steps a pass, 2 passes, then 2 epochs."""
    settings: dict[str, Any] = {
        "model__width": 8, "model__layers": 2, "model__num_samples": None, "model__data_cache": str(folder / "cache"),
        "sequence_length": 12, "batch_size": 8, "data__dataset": None, "data__path": (str(folder / "documents"),),
        "data__holdout": 0.15, "epochs__train": 2.0, "report__plots": False, "output_dir": folder / "run", "keep": 50,
    } | changes  # fmt: skip
    fixed_point = {name[13:]: settings.pop(name) for name in list(settings) if name.startswith("fixed_point__")}
    section = replace_section(cvfp_tiny().model.fixed_point, {"iterations": 2, "converged": 1.0, **fixed_point})  # type: ignore[attr-defined]
    prediction = {name[12:]: settings.pop(name) for name in list(settings) if name.startswith("prediction__")}
    settings["model__fixed_point"] = section
    settings["model__prediction"] = replace_section(cvfp_tiny().model.prediction, prediction)  # type: ignore[attr-defined]
    return replace(cvfp_tiny(), **settings)


def replace_section(section: Any, changes: dict[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(section, **changes)
