"""A small olmo model on one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.parallel.topology import Topology
from pipeline.system import StepContext, StepOutput
from pipeline.systems.olmo import create
from pipeline.systems.olmo.model import OlmoModel
from pipeline.systems.olmo.system import OlmoSystem
from tests.launch.olmo_cases import olmo
from tests.launch.parity_main import LENGTH, VOCABULARY
from tests.systems.miras.harness import batch

LENGTHS = [29, LENGTH - 29]


def small(kind: str = "olmo", **changes: Any) -> RunConfig:
    return olmo(kind, rows=1, length=LENGTH, vocabulary=VOCABULARY, **changes)


def built(config: RunConfig, dtype: torch.dtype = torch.float32) -> tuple[OlmoSystem, OlmoModel]:
    system = create(config)
    assert isinstance(system, OlmoSystem)
    model = system.build()
    assert isinstance(model, OlmoModel)
    system.initialise(model, Topology())
    return system, model.to(dtype)


def run(system: OlmoSystem, model: OlmoModel, ids: Tensor, **options: bool) -> StepOutput:
    """Of one row of two documents."""
    return system.forward(model, batch(ids, LENGTHS), {}, StepContext(Topology(), 0, "train", 1, options))
