"""Recipes of the miras system: OLMo2 with neural long-term memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config import (
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    ReportConfig,
    RunConfig,
    replace,
)
from pipeline.data_config import DataConfig, RecallConfig
from pipeline.lm.config import SMOLLM2, AttentionConfig, BackboneConfig
from pipeline.systems.miras.config import DistillationConfig, MemoryConfig, MirasConfig, Rule
from pipeline.systems.miras.rule_config import MlpConfig, SlotsConfig, SwigluConfig

DOLMA = DataConfig(dataset="allenai/dolma3_mix-6T-1025", tokenizer="allenai/OLMo-2-0425-1B", min_tokens=8192)


def miras_64k() -> RunConfig:
    """OLMo2-1B, frozen, with memory on four layers: 64K tokens, 8 sequences per GPU, 50K steps."""
    return RunConfig(
        recipe="miras_64k",
        model=MirasConfig(backbone=BackboneConfig(pretrained="allenai/OLMo-2-0425-1B")),
        steps=50_000,
        warmup_steps=500,
        sequence_length=65_536,
        batch_size=8,
        lr=1e-4,
        weight_decay=0.01,
        clip=1.0,
        zero="zero2",
        activation_checkpointing=True,
        save_every=500,
        eval_every=500,
        output_dir=Path("outputs/miras_64k"),
        data=DOLMA,
        evaluation=EvaluationConfig(steps=4, batch_size=1),
    )


def miras_32k() -> RunConfig:
    """As miras_64k at 32K tokens, 16 sequences per GPU."""
    return replace(
        miras_64k(), recipe="miras_32k", sequence_length=32_768, batch_size=16, output_dir=Path("outputs/miras_32k")
    )


def miras_128k() -> RunConfig:
    """As miras_64k at 128K tokens, 4 sequences per GPU."""
    return replace(
        miras_64k(), recipe="miras_128k", sequence_length=131_072, batch_size=4, output_dir=Path("outputs/miras_128k")
    )


def miras_tiny() -> RunConfig:
    """A small OLMo2 with memory on the Python library, ZeRO-3 and two sequence ranks: minutes on two cores."""
    return RunConfig(
        recipe="miras_tiny",
        model=MirasConfig(
            backbone=BackboneConfig(
                trainable=True, layers=4, width=128, heads=4, kv_heads=4, ffn=512, vocabulary=260, rope_theta=10_000.0
            ),
            attention=AttentionConfig(window=64, sinks=4),
            memory=MemoryConfig(layers=(1, 3), heads=4, head_dim=32, persistent=4, gate_rank=16, context=64),
        ),
        steps=200,
        warmup_steps=10,
        sequence_length=1024,
        batch_size=4,
        lr=3e-3,
        weight_decay=0.1,
        zero="zero3",
        parallel=ParallelConfig(sequence=2),
        save_every=100,
        eval_every=50,
        output_dir=Path("outputs/miras_tiny"),
        evaluation=EvaluationConfig(steps=8),
    )


def miras() -> RunConfig:
    """A pretrained decoder of your own (--model.backbone.pretrained), frozen, with slots behind a window of 256."""
    run = miras_smollm2()
    assert isinstance(run.model, MirasConfig)
    # The reach fits a backbone that was trained at 4,096 tokens.
    slots = SlotsConfig(count=512, reach=3776, importance=True)
    memory = dataclasses.replace(run.model.memory, layers=("every1",), slots=slots)
    return replace(
        run,
        recipe="miras",
        model=dataclasses.replace(run.model, memory=memory, distillation=DistillationConfig()),
        steps=200,
        warmup_steps=10,
        compile=False,
        save_every=50,
        eval_every=100,
        output_dir=Path("outputs/miras"),
        data__min_tokens=1024,
    )


def miras_smollm2() -> RunConfig:
    """SmolLM2-135M, frozen, a window of 256 and slots behind it in every layer: 30 minutes on two cores."""
    return RunConfig(
        recipe="miras_smollm2",
        model=MirasConfig(
            # The sizes are those of the folder's config, for `plan` before it is fetched.
            backbone=BackboneConfig(
                pretrained=SMOLLM2, model_type="llama", tied=True, layers=30, width=576, heads=9, kv_heads=3, ffn=1536,
                vocabulary=49152, rope_theta=100_000.0, norm_eps=1e-5,
            ),
            attention=AttentionConfig(window=256, sinks=4),
            # What closed most of the gap among what was tried: docs/decisions/0033-slots-behind-the-window.md and 0037.
            memory=MemoryConfig(
                layers=tuple(range(30)), attachment="slots", slots=SlotsConfig(count=512, reach=7680, importance=True),
            ),
            # Cross-entropy: docs/decisions/0035-slots-learn-from-the-next-token.md. For --model.distil full:
            distillation=DistillationConfig(tokens=1280),
        ),
        # Half an hour on two cores, at 12 s each.
        steps=140,
        warmup_steps=4,
        # Within 2K tokens an untrained memory leaves little to learn.
        sequence_length=4096,
        batch_size=1,
        lr=1e-3,
        zero="zero1",
        precision="bf16",
        # A twentieth less time a step and a sixth less memory, for half a minute of the first step.
        compile=True,
        save_every=35,
        eval_every=140,
        output_dir=Path("outputs/miras_smollm2"),
        data=DataConfig(tokenizer=SMOLLM2, min_tokens=3000),
        evaluation=EvaluationConfig(steps=1, batch_size=1),
    )  # fmt: skip


def miras_smollm2_short() -> RunConfig:
    """miras_smollm2 for a test: 12 steps of 2,048 tokens, evaluated at the end on as little."""
    run = miras_smollm2()
    assert isinstance(run.model, MirasConfig)
    # Fewer slots than tokens behind the window: where all have room there is nothing to learn.
    memory = dataclasses.replace(run.model.memory, slots=SlotsConfig(count=128, reach=1792, importance=True))
    return replace(
        run,
        recipe="miras_smollm2_short",
        model__memory=memory,
        steps=12,
        warmup_steps=2,
        sequence_length=2048,
        compile=False,
        save_every=0,
        eval_every=12,
        data__min_tokens=1536,
        output_dir=Path("outputs/miras_smollm2_short"),
    )


def miras_recall() -> RunConfig:
    """Key-value pairs, a gap that attention cannot bridge, then queries: only a working memory can answer."""
    return RunConfig(
        recipe="miras_recall",
        model=MirasConfig(
            backbone=BackboneConfig(
                trainable=True, layers=2, width=64, heads=2, kv_heads=2, ffn=128, vocabulary=49, rope_theta=10_000.0
            ),
            attention=AttentionConfig(window=32, sinks=0),
            memory=MemoryConfig(
                layers=(0, 1),
                heads=2,
                head_dim=32,
                persistent=0,
                gate_rank=16,
                step_size=(0.5, 0.1),
                # Pairs and queries lie in different chunks.
                context=32,
                mlp=MlpConfig(hidden=2),
                swiglu=SwigluConfig(gradient_chunk=32),
            ),
        ),
        steps=300,
        warmup_steps=20,
        sequence_length=256,
        batch_size=16,
        lr=3e-3,
        zero="zero1",
        save_every=0,
        eval_every=100,
        output_dir=Path("outputs/miras_recall"),
        data=DataConfig(recall=RecallConfig(keys=16, values=16, fillers=16)),
        optimizer=OptimizerConfig(betas=(0.9, 0.98)),
        report=ReportConfig(log_every=10),
        evaluation=EvaluationConfig(steps=8),
    )


def miras_recall_long() -> RunConfig:
    """Recall with gaps on a log scale, through the carry: trained to 1K tokens, asked at up to a million."""
    recipe = miras_recall()
    assert isinstance(recipe.model, MirasConfig)
    memory = dataclasses.replace(
        recipe.model.memory,
        rule="delta",
        # Filler has to write nothing at all: a step size of 2e-5 halves what is stored over a million tokens.
        write_gate="hard",
        write_penalty=0.05,
        # Nor may anything be forgotten: a half-life of 1e9 tokens keeps 0.9993 of it over a million.
        half_life=(1e9, 1e9),
        step_size=(0.5, 0.5),
    )
    return replace(
        recipe,
        recipe="miras_recall_long",
        model=dataclasses.replace(recipe.model, memory=memory),
        data=DataConfig(recall=RecallConfig(keys=16, values=16, fillers=16, max_gap=1024, spread="log")),
        steps=400,
        batch_size=32,
        optimizer=OptimizerConfig(betas=(0.9, 0.98), schedule="constant"),
        output_dir=Path("outputs/miras_recall_long"),
    )


def miras_recall_delta() -> RunConfig:
    """miras_recall with the delta rule (no momentum), the baseline."""
    return _recall("delta")


def miras_recall_moneta() -> RunConfig:
    """A smaller recall task, half as long, for p-norm bias and q-norm retention (MONETA), which is slower to learn."""
    task = RecallConfig(keys=8, values=8, fillers=8, pairs=4, queries=4, max_gap=110)
    return replace(_recall("moneta"), data__recall=task, sequence_length=128, batch_size=32)


def miras_recall_yaad() -> RunConfig:
    """miras_recall with Huber bias (YAAD)."""
    return _recall("yaad")


def miras_recall_memora() -> RunConfig:
    """miras_recall with softmax retention (MEMORA)."""
    return _recall("memora")


def miras_recall_mlp() -> RunConfig:
    """miras_recall with a two-layer memory, and twice the steps."""
    return replace(_recall("mlp"), steps=600)


def miras_recall_swiglu() -> RunConfig:
    """miras_recall with a SwiGLU memory, in chunks that fit the task."""
    return _recall("swiglu")


def _recall(rule: Rule) -> RunConfig:
    recipe = miras_recall()
    assert isinstance(recipe.model, MirasConfig)
    model = dataclasses.replace(recipe.model, memory=dataclasses.replace(recipe.model.memory, rule=rule))
    name = f"miras_recall_{rule}"
    return replace(recipe, recipe=name, model=model, output_dir=Path("outputs") / name)
