"""The config.yaml of an OLMo run that trains as a run of this system does; `pipeline.recipes.olmo_yaml` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.data.tokens.listing import names_of
from pipeline.systems.olmo.config import OlmoConfig

SCHEDULES = {"cosine": "cosine_with_warmup", "linear": "linear_with_warmup", "constant": "constant_with_warmup"}
PRECISIONS = {"bf16": "amp_bf16", "fp16": "amp_fp16", "fp32": "fp32"}


def native_run(config: RunConfig, model: Mapping[str, Any], global_batch: int, cutoff: float) -> dict[str, Any]:
    """Its content, as plain YAML values. `model`: the fields of the decoder in it; `cutoff`: the standard
    deviations beyond which no random weight lies. What this system has no setting for is left to OLMo's defaults."""
    sizes = config.model
    assert isinstance(sizes, OlmoConfig)
    data, optimizer = config.data, config.optimizer
    tokens: dict[str, Any] = {}
    if data.tokens:
        # Without their ratios, which OLMo has not.
        tokens = {"paths": names_of(data.tokens)}
        if data.token_dtype != "auto":
            tokens["memmap_dtype"] = data.token_dtype
    return {
        "run_name": config.run_name or config.recipe,
        "seed": config.seed,
        "model": {
            **model,
            "init_fn": sizes.initialisation,
            "init_std": sizes.backbone.initializer_range,
            "init_cutoff_factor": cutoff,
        },
        "softmax_auxiliary_loss": sizes.z_loss > 0,
        **({"auxiliary_loss_multiplier": sizes.z_loss} if sizes.z_loss else {}),
        "optimizer": {
            "name": "adamw",
            "learning_rate": config.lr,
            "weight_decay": config.weight_decay,
            "eps": optimizer.eps,
            "betas": list(optimizer.betas),
            "decay_norm_and_bias": sizes.decay_norms,
            "decay_embeddings": sizes.decay_embeddings,
        },
        "scheduler": {
            "name": SCHEDULES[optimizer.schedule],
            "units": "steps",
            "t_warmup": config.warmup_steps,
            "t_max": config.steps,
            "alpha_f": optimizer.min_lr_ratio,
            "warmup_min_lr": optimizer.warmup_start * config.lr,
        },
        "data": {**tokens, "generate_doc_lengths": data.document_mask},
        # A path from here means nothing elsewhere.
        "tokenizer": {
            "identifier": str(Path(data.tokenizer).absolute()) if Path(data.tokenizer).exists() else data.tokenizer,
            "truncate_direction": "right",
        },
        "save_folder": str(config.output_dir),
        "save_interval": config.save_every,
        "eval_interval": config.eval_every,
        "max_duration": min(config.steps, config.stop_after or config.steps),
        "global_train_batch_size": global_batch,
        "device_train_microbatch_size": config.batch_size,
        **({"precision": PRECISIONS[config.precision]} if config.precision in PRECISIONS else {}),
        "max_grad_norm": config.clip or None,
    }
