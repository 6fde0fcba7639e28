"""DeepSpeed's part of a checkpoint: DeepSpeed decides what belongs in which file; we write and read the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from pipeline.checkpoint.safe import load_pickle, plain


class ShardFiles(CheckpointEngine):
    """Collects what DeepSpeed would write; loads without running the code in a pickle.

    DeepSpeed saves between collectives: a rank whose disk is full would leave the others waiting in the next one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "mnemos"
        self.collected: dict[Path, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self.collected = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: folders are made when the files are written."""

    def save(self, state_dict: Any, path: str) -> None:
        self.collected[Path(path)] = plain(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_pickle(Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def pop_collected(self) -> dict[Path, Any]:
        """What was collected, by the path that DeepSpeed would have written."""
        collected, self.collected = self.collected, {}
        return collected
