"""Recipes of the cvfp system: contexts by a fixed point, on UltraChat in the guide's two sizes and on local text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config import EpochsConfig, EvaluationConfig, OptimizerConfig, ReportConfig, RunConfig
from pipeline.data_config import DataConfig
from pipeline.systems.cvfp.config import CvfpConfig, FixedPointConfig
from pipeline.systems.cvfp.guide_flags import in_own_flags

__all__ = ["cvfp_10k", "cvfp_100k", "cvfp_tiny", "in_own_flags"]

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ROWS = 32
"""Documents of a step."""


def _preset(name: str, documents: int) -> RunConfig:
    iterations = 10
    slots = -(-documents // ROWS)
    return RunConfig(
        recipe=name,
        model=CvfpConfig(
            embedding="gpt2",
            num_samples=documents,
            fixed_point=FixedPointConfig(iterations=iterations, steps=iterations * slots),
        ),
        steps=10 * slots,
        epochs=EpochsConfig(train=10, save=2, evaluate=1),
        sequence_length=128,
        batch_size=ROWS,
        lr=2e-3,
        clip=1.0,
        data=DataConfig(dataset=ULTRACHAT, split="train_sft", text_field="messages", tokenizer="gpt2", holdout=0.1),
        optimizer=OptimizerConfig(betas=(0.9, 0.999), schedule="constant"),
        evaluation=EvaluationConfig(best="loss", patience=3),
        report=ReportConfig(log_every=1),
        output_dir=Path("outputs") / name,
    )


def cvfp_10k() -> RunConfig:
    """Context vectors by a fixed point, 91M parameters: 78 UltraChat documents of up to 128 tokens, 10K tokens."""
    return _preset("cvfp_10k", 78)


def cvfp_100k() -> RunConfig:
    """Context vectors by a fixed point, 91M parameters: 781 UltraChat documents of up to 128 tokens, 100K tokens."""
    return _preset("cvfp_100k", 781)


def cvfp_tiny() -> RunConfig:
    """A small fixed point of contexts on the Python library's files: minutes on two cores, nothing downloaded."""
    recipe = _preset("cvfp_tiny", 320)
    assert isinstance(recipe.model, CvfpConfig)
    model = dataclasses.replace(recipe.model, width=64, layers=2, vocab=256, embedding=None)
    return dataclasses.replace(recipe, model=model, data=DataConfig(dataset="stdlib", holdout=0.1))
