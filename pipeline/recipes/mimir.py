"""Recipes of the mimir system: discrete diffusion over peptides, in three sizes, and on sets that need no file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config import EpochsConfig, EvaluationConfig, OptimizerConfig, ReportConfig, RunConfig
from pipeline.data_config import DataConfig
from pipeline.systems.mimir.config import MimirConfig

PEPTIDES = 1_003_488
"""Of the guide's data: its epoch has 3,920 batches of 256."""
DATASET = "data/dataset.csv"
"""Where the guide's data lies."""


def _preset(name: str, model: MimirConfig, *, epochs: float, lr: float, warmup_steps: int) -> RunConfig:
    batch_size = 256
    return RunConfig(
        recipe=name,
        model=model,
        # Of the guide's data; with data of another size, what its epochs come to.
        steps=round(epochs * -(-PEPTIDES // batch_size)),
        epochs=EpochsConfig(train=epochs, save=1.0, evaluate=1.0, sample=10.0),
        warmup_steps=warmup_steps,
        sequence_length=model.max_length,
        batch_size=batch_size,
        lr=lr,
        weight_decay=0.01,
        clip=1.0,
        data=DataConfig(path=(DATASET,)),
        optimizer=OptimizerConfig(betas=(0.9, 0.999), min_lr_ratio=0.0, ema_decay=0.999),
        evaluation=EvaluationConfig(best="bound"),
        report=ReportConfig(log_every=50),
        output_dir=Path("outputs") / name,
    )


def mimir_small() -> RunConfig:
    """Peptide diffusion, 0.84M parameters, 10 timesteps: 20 epochs of --data.path in batches of 256."""
    return _preset("mimir_small", MimirConfig(), epochs=20, lr=5e-4, warmup_steps=500)


def mimir_medium() -> RunConfig:
    """Peptide diffusion, 3.9M parameters, 25 timesteps: 75 epochs of --data.path in batches of 256."""
    model = MimirConfig(width=256, layers=4, heads=4, timesteps=25, hybrid_loss_coeff=1e-3)
    return _preset("mimir_medium", model, epochs=75, lr=3e-4, warmup_steps=1000)


def mimir_large() -> RunConfig:
    """Peptide diffusion, 21.5M parameters, 35 timesteps: 150 epochs of --data.path in batches of 256."""
    model = MimirConfig(width=512, layers=6, heads=8, timesteps=35, hybrid_loss_coeff=1e-2)
    return _preset("mimir_large", model, epochs=150, lr=1e-4, warmup_steps=2000)


def mimir_tiny() -> RunConfig:
    """A small peptide diffusion on a synthetic set with planted motifs: minutes on two cores, nothing downloaded."""
    recipe = _preset("mimir_tiny", MimirConfig(width=64, targets=31), epochs=10, lr=2e-3, warmup_steps=50)
    return dataclasses.replace(
        recipe,
        steps=1500,
        batch_size=128,
        epochs=EpochsConfig(train=10, save=5, evaluate=2.5, sample=5),
        data=DataConfig(dataset="synthetic"),
        report=ReportConfig(log_every=1),
    )


def mimir_amp() -> RunConfig:
    """Peptide diffusion on antimicrobial peptides and UniProt background, up to 50 residues, of the package modlamp."""
    model = MimirConfig(max_length=50, targets=0, kernel="absorbing", timesteps=50)
    recipe = _preset("mimir_amp", model, epochs=200, lr=5e-4, warmup_steps=100)
    return dataclasses.replace(
        recipe,
        steps=1800,
        batch_size=64,
        epochs=EpochsConfig(train=200, save=20, evaluate=10, sample=50),
        data=DataConfig(dataset="modlamp", holdout=0.1),
        report=ReportConfig(log_every=10),
        evaluation=EvaluationConfig(best="bound", patience=5),
    )
