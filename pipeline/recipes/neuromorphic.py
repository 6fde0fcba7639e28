"""Recipes of the neuromorphic system: three phases in the guide's presets, and on text that is on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config import AUTO_ID, EvaluationConfig, OptimizerConfig, ReportConfig, RunConfig
from pipeline.data_config import DataConfig
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.facts_config import FactsConfig
from pipeline.systems.neuromorphic.guide_flags import TOKENIZERS, in_own_flags

__all__ = [
    "in_own_flags", "neuromorphic", "neuromorphic_facts", "neuromorphic_phase_a_to_b", "neuromorphic_phase_a_to_c",
    "neuromorphic_phase_c_from_ckpt", "neuromorphic_quick_test", "neuromorphic_tiny",
]  # fmt: skip

TOKENIZER = TOKENIZERS["tinyllama"]
"""Of 32,000 ids."""


def neuromorphic() -> RunConfig:
    """Columns with three memories, tier b, 102M parameters: phases A, B and C, or those of --phase and --phases."""
    return RunConfig(
        recipe="neuromorphic",
        model=NeuromorphicConfig(lifelong_steps=2500),
        steps=5000,
        warmup_steps=1000,
        sequence_length=256,
        batch_size=32,
        lr=3e-4,
        weight_decay=0.01,
        clip=1.0,
        seed=42,
        save_every=2500,
        eval_every=200,
        sample_every=200,
        ablate_every=1000,
        run_id=AUTO_ID,
        data=DataConfig(tokenizer=TOKENIZER),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), min_lr=1e-5),
        evaluation=EvaluationConfig(steps=20),
        report=ReportConfig(log_every=50, plot_every=500),
        output_dir=Path("outputs/neuromorphic"),
    )


def _preset(name: str, **changes: object) -> RunConfig:
    recipe = f"neuromorphic_{name}"
    return dataclasses.replace(neuromorphic(), recipe=recipe, output_dir=Path("outputs") / recipe, **changes)  # type: ignore[arg-type]


def neuromorphic_phase_a_to_c() -> RunConfig:
    """All phases, 153.6M tokens at --bs 48: working and procedural memory, then episodic memory, then lifelong."""
    return _preset("phase_a_to_c")


def neuromorphic_phase_a_to_b() -> RunConfig:
    """Phases A and B: working and procedural memory on TinyStories, then episodic memory on FineWeb-Edu and DCLM."""
    return _preset("phase_a_to_b", phases=("A", "B"))


def neuromorphic_phase_c_from_ckpt() -> RunConfig:
    """Phase C alone, lifelong, from the checkpoint of --resume that ended phase B."""
    return _preset("phase_c_from_ckpt", phase="C")


def neuromorphic_quick_test() -> RunConfig:
    """Phases A and B of 200 steps each, to see that everything works."""
    return _preset(
        "quick_test", phases=("A", "B"), steps=200, warmup_steps=20, ablate_every=200, model=NeuromorphicConfig()
    )


def neuromorphic_tiny() -> RunConfig:
    """A small model in all three phases on the Python library's files: minutes on two cores, nothing downloaded."""
    return dataclasses.replace(
        neuromorphic(),
        recipe="neuromorphic_tiny",
        model=NeuromorphicConfig(tier="tiny", vocab=260, span=32, lifelong_steps=50),
        steps=100,
        warmup_steps=20,
        sequence_length=128,
        batch_size=8,
        lr=2e-3,
        save_every=50,
        eval_every=50,
        sample_every=50,
        ablate_every=50,
        run_id=None,
        data=DataConfig(dataset="stdlib"),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), min_lr=1e-4),
        evaluation=EvaluationConfig(steps=8),
        report=ReportConfig(log_every=1, plot_every=50),
        output_dir=Path("outputs/neuromorphic_tiny"),
    )


def neuromorphic_facts() -> RunConfig:
    """A small model that learns what it is told: facts asked for beyond its window, and lifelong in later documents."""
    task = FactsConfig(
        fillers=8, domains=2, fewest=1, within=2, documents=2, least_distance=20, least_tokens=40, most_tokens=52
    )
    return dataclasses.replace(
        neuromorphic_tiny(),
        recipe="neuromorphic_facts",
        model=NeuromorphicConfig(
            tier="tiny",
            span=16,
            window=16,
            width=64,
            decoder_width=32,
            episodes=128,
            episodic_width=64,
            lifelong_steps=250,
            facts=task,
            vocab=task.vocab,
        ),
        # A procedural memory that phase A has trained answers some questions, and what is left teaches episodic memory
        # little: after 400 steps of A and of B each, 38 % of the answers were right.
        phases=("B", "C"),
        steps=600,
        warmup_steps=50,
        sequence_length=64,
        batch_size=32,
        lr=3e-3,
        save_every=200,
        eval_every=50,
        sample_every=0,
        ablate_every=200,
        data=DataConfig(),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), min_lr=3e-4),
        report=ReportConfig(log_every=10, plot_every=200),
        output_dir=Path("outputs/neuromorphic_facts"),
    )
