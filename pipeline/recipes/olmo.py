"""Recipes of the olmo system: OLMo-1B of three generations, from random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config import EvaluationConfig, OptimizerConfig, RunConfig, replace
from pipeline.data_config import DataConfig
from pipeline.lm.config import BackboneConfig
from pipeline.systems.olmo.config import OlmoConfig


def olmo_1b() -> RunConfig:
    """OLMo-1B of February 2024 from scratch: 64 sequences of 2,048 tokens a step, 7,640 steps, 1B tokens."""
    return RunConfig(
        recipe="olmo_1b",
        model=OlmoConfig(),
        steps=7640,
        warmup_steps=500,
        sequence_length=2048,
        batch_size=8,
        global_batch_size=64,
        grad_accum=8,
        lr=4e-4,
        weight_decay=0.1,
        clip=1.0,
        zero="zero1",
        save_every=1000,
        eval_every=2000,
        output_dir=Path("outputs/olmo_1b"),
        data=DataConfig(tokenizer="allenai/OLMo-1B-0724-hf"),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), eps=1e-5, warmup_start=0.1, min_lr_ratio=0.1),
    )


def olmo_1b_0724() -> RunConfig:
    """As olmo_1b with the model that was released in July 2024: 4,096 tokens, untied, queries and keys clipped."""
    recipe = olmo_1b()
    assert isinstance(recipe.model, OlmoConfig)
    backbone = dataclasses.replace(recipe.model.backbone, tied=False, clip_qkv=8.0)
    return replace(
        recipe,
        recipe="olmo_1b_0724",
        model=dataclasses.replace(recipe.model, backbone=backbone),
        # As many tokens per step.
        sequence_length=4096,
        batch_size=4,
        global_batch_size=32,
        output_dir=Path("outputs/olmo_1b_0724"),
    )


def olmo2_1b() -> RunConfig:
    """OLMo-2-0425-1B from scratch: 512 sequences of 4,096 tokens a step, a schedule of 5T tokens, stopped at 4T."""
    return RunConfig(
        recipe="olmo2_1b",
        model=OlmoConfig(
            backbone=BackboneConfig(trainable=True),
            initialisation="normal",
            decay_norms=True,
            z_loss=1e-5,
        ),
        # 5T and 4T tokens in steps of 2,097,152.
        steps=2_384_186,
        stop_after=1_907_349,
        warmup_steps=4000,
        sequence_length=4096,
        batch_size=4,
        global_batch_size=512,
        grad_accum=128,
        lr=4e-4,
        weight_decay=0.1,
        clip=1.0,
        zero="zero1",
        save_every=1000,
        eval_every=1000,
        output_dir=Path("outputs/olmo2_1b"),
        data=DataConfig(tokenizer="allenai/OLMo-2-0425-1B"),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), eps=1e-8),
    )


def olmo_tiny() -> RunConfig:
    """A small OLMo on the Python library: minutes on two cores, nothing downloaded."""
    return RunConfig(
        recipe="olmo_tiny",
        model=OlmoConfig(
            backbone=BackboneConfig(
                trainable=True, model_type="olmo", tied=True, layers=4, width=128, heads=4, kv_heads=4, ffn=512,
                vocabulary=260, rope_theta=10_000.0, norm_eps=1e-5,
            ),
        ),
        # Many updates of few tokens learn most in a given time.
        steps=1200,
        warmup_steps=60,
        sequence_length=256,
        batch_size=4,
        lr=4e-3,
        weight_decay=0.1,
        zero="zero0",
        save_every=600,
        eval_every=600,
        output_dir=Path("outputs/olmo_tiny"),
        evaluation=EvaluationConfig(steps=128),
    )  # fmt: skip
