"""A small mimir system on one rank, on a synthetic set that is made once."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch

from pipeline.config import EpochsConfig, EvaluationConfig, RunConfig, replace
from pipeline.parallel.topology import Topology
from pipeline.recipes.mimir import mimir_tiny
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, StepContext, StepOutput
from pipeline.systems.mimir import create
from pipeline.systems.mimir.config import EncoderConfig
from pipeline.systems.mimir.data.build import list_peptides
from pipeline.systems.mimir.model import MimirModel
from pipeline.systems.mimir.peptides import PeptideBatch, PeptideSet
from pipeline.systems.mimir.system import MimirSystem

PEPTIDES = 300
ALONE = Topology()


def small(**changes: Any) -> RunConfig:
    """Narrow and short: two blocks of width 16, batches of 32. Changes of the model are named model__FIELD."""
    base = dataclasses.replace(
        mimir_tiny(),
        batch_size=32,
        steps=4,
        epochs=EpochsConfig(),
        save_every=0,
        eval_every=0,
        warmup_steps=1,
        evaluation=EvaluationConfig(),
        optimizer=dataclasses.replace(mimir_tiny().optimizer, ema_decay=0.0),
    )
    fixed: dict[str, Any] = {
        "model__width": 16, "model__layers": 2, "model__heads": 2, "model__encoder": EncoderConfig(width=8, longest=80),
        "data__dataset": f"synthetic:{PEPTIDES}", "data__holdout": 0.2, "report__plots": False,
    }  # fmt: skip
    return replace(base, **{**fixed, **changes})


@cache
def peptides() -> PeptideSet:
    return list_peptides(small())


def created(config: RunConfig, found: PeptideSet | None = None) -> MimirSystem:
    """The system of the config with what the data decides."""
    system = create(config)
    system.files = found or peptides()
    settled = system.settled(ALONE)
    if settled != config:
        system = create(settled)
        system.files = found or peptides()
    assert isinstance(system, MimirSystem)
    return system


def built(system: MimirSystem, dtype: torch.dtype = torch.float32) -> MimirModel:
    model = system.build()
    assert isinstance(model, MimirModel)
    system.initialise(model, ALONE)
    return model.to(dtype)


def first_batch(system: MimirSystem) -> PeptideBatch:
    (batch,) = system.loader(system.phases(system.build())[0], ALONE).next_step()
    return batch


def forward(system: MimirSystem, model: MimirModel, batch: PeptideBatch) -> StepOutput:
    return system.forward(model, batch, {}, StepContext(ALONE, system.config.seed, "train", 1))


def evaluated(system: MimirSystem, model: MimirModel) -> Evaluation:
    return system.evaluate(model, system.phases(model)[0], SyncPoint(ALONE))
