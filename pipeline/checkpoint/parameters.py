"""The trained parameters of a complete checkpoint by name, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.safe import load_pickle
from pipeline.checkpoint.universal_convert import (
    FORMAT,
    MASTER,
    OPTIMIZER_STATE,
    PARAMETERS,
    STEP,
    TENSORS,
    Saved,
    Shards,
)


class Parameters:
    """Reads them one at a time: float32 weights, moments, and how many updates they have seen."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._manifest = read_manifest(checkpoint) or {}
        self._universal = self._manifest.get("format") == FORMAT

    def read(self, *, moments: bool = True) -> Iterator[Saved]:
        """Every one; without `moments` the weights alone. Raises UserError."""
        if not self._universal:
            yield from Shards(self.checkpoint, self._manifest, moments=moments).parameters()
            return
        for folder in sorted(path for path in (self.checkpoint / PARAMETERS).iterdir() if path.is_dir()):
            kinds = TENSORS if moments else (MASTER,)
            tensors = {kind: load_pickle(folder / f"{kind}.pt", mmap=True)["param"] for kind in kinds}
            yield Saved(folder.name, tensors, float(load_pickle(folder / f"{STEP}.pt")))

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: hyper-parameters, `name`, and the names of their `parameters`."""
        if self._universal:
            state = load_pickle(self.checkpoint / PARAMETERS / OPTIMIZER_STATE)
        else:
            state = Shards(self.checkpoint, self._manifest, moments=False).optimizer_state()
        return list(state["param_groups"])
