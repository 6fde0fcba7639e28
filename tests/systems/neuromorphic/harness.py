"""Small runs of the system on documents that are made here, several of which end inside a span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig, replace
from pipeline.parallel.topology import Topology
from pipeline.recipes.neuromorphic import neuromorphic_tiny
from pipeline.system import System, create_system

SIZES = {
    "span": 8, "width": 16, "layers": 2, "columns": 2, "slots": 3, "window": 12, "working_width": 8, "working_heads": 2,
    "episodes": 6, "episodic_width": 6, "retrieved": 2, "candidates": 3, "decoder_width": 8, "decoder_heads": 2,
    "decoder_layers": 1, "thalamic_tokens": 2,
}  # fmt: skip
WORDS = "the of and a to in is you that it he was for on are as with his they at".split()
DOCUMENTS = 60


def documents(folder: Path, count: int = DOCUMENTS) -> Path:
    """A folder of short documents, of 5 to 60 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        words = random.choice(WORDS, size=random.integers(2, 16))
        (folder / f"{number:02d}.txt").write_text(" ".join([*words, str(number)]))
    return folder


def small(folder: Path, **changes: Any) -> RunConfig:
    """A run of three phases of three steps of four streams of 16 tokens, on documents in `folder`."""
    settings: dict[str, Any] = {
        **{f"model__{name}": value for name, value in SIZES.items()}, "model__lifelong_steps": None,
        "steps": 3, "warmup_steps": 1, "sequence_length": 16, "batch_size": 4, "data__dataset": None,
        "data__path": (str(folder / "documents"),), "data__holdout": 0.15, "save_every": 0, "eval_every": 0,
        "sample_every": 0, "ablate_every": 0, "evaluation__steps": 2, "report__plots": False, "keep": 50,
        "output_dir": folder / "run",
    } | changes  # fmt: skip
    return replace(neuromorphic_tiny(), **settings)


def created(config: RunConfig) -> System[Any]:
    """The system of a config with its data listed."""
    system = create_system(config)
    system.files = system.list_data()
    return create_system_of(system)


def create_system_of(system: System[Any]) -> System[Any]:
    """The system as a run has it, with all that the data decides."""
    settled = create_system(system.settled(Topology()))
    settled.files = system.files
    return settled
