"""OLMo's own training configurations, such as configs/official/OLMo-1B.yaml of github.com/allenai/OLMo, as runs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, replace
from pipeline.durations import number, steps_of, whole
from pipeline.errors import UserError, shown
from pipeline.lm.olmo_config import DEFAULTS
from pipeline.lm.olmo_folder import tokenizer_name
from pipeline.recipes.olmo import olmo2_1b, olmo_1b
from pipeline.runtime.exit import log_line
from pipeline.systems.olmo import native_config
from pipeline.systems.olmo.config import CUTOFF
from pipeline.systems.olmo.native_config import read_model
from pipeline.units import LARGEST

Section = Mapping[str, Any]

SCHEDULES = {
    "cosine_with_warmup": "cosine", "linear_with_warmup": "linear", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
PRECISIONS = {"amp_bf16": "bf16", "amp_fp16": "fp16", "fp32": "fp32"}
TOKENIZERS = {
    "allenai_gpt-neox-olmo-dolma-v1_5.json": "allenai/OLMo-1B-0724-hf",
    "allenai_eleuther-ai-gpt-neox-20b-pii-special.json": "allenai/OLMo-1B-0724-hf",
    "allenai_dolma2.json": "allenai/OLMo-2-0425-1B",
}
"""Files of OLMo's repository, by the models that were trained with them."""
SECTIONS = ("model", "optimizer", "scheduler", "data")
"""Sections of which fields are read."""
READ = {
    "model": native_config.READ,
    "optimizer": {
        "name", "learning_rate", "weight_decay", "betas", "eps", "decay_norm_and_bias", "decay_embeddings",
    },
    "scheduler": {"name", "units", "t_warmup", "t_max", "alpha_f", "warmup_min_lr"},
    "data": {"paths", "memmap_dtype", "generate_doc_lengths"},
    "": {
        "run_name", "seed", "max_duration", "global_train_batch_size", "device_train_microbatch_size", "precision",
        "max_grad_norm", "save_interval", "save_num_checkpoints_to_keep", "eval_interval", "softmax_auxiliary_loss",
        "auxiliary_loss_multiplier", "load_path", "dry_run", "stop_at", "activation_checkpointing",
        *SECTIONS,
    },
}  # fmt: skip
"""Fields that are read, by section."""
WITHOUT_EFFECT = {
    "model": native_config.NO_EFFECT,
    "optimizer": {"metrics_log_interval"},
    "data": {
        "num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "timeout", "pad_direction", "drop_last",
    },
    "": {"compile", "fused_loss", "save_folder", "save_overwrite", "tokenizer"},
}  # fmt: skip
"""Fields that are OLMo's way to do what is done here without them, and those that have a reader of their own."""


def read_foreign(content: dict[str, Any], where: str) -> RunConfig | None:
    """The run that a file of OLMo's form means, over the recipe of its model; None for a file of another form.

    Fields that have no effect here are named in one line. Raises UserError.
    """
    model = content.get("model")
    if not isinstance(model, dict) or "d_model" not in model:
        return None
    for name in SECTIONS:
        if not isinstance(content.get(name) or {}, dict):
            raise UserError(f"{where}: {name} is {shown(content[name])}: give it as a section")
    content = _resolved(content, where)
    folder, tokenizer, eos_id = _folder(content), _tokenizer(content), content["model"].get("eos_token_id")
    if type(eos_id) is not int or eos_id < 0:
        eos_id = None
    _name_others(content, where, folder=folder, tokenizer=tokenizer)
    if content.get("load_path") is not None:
        path = shown(content["load_path"])
        raise UserError(
            f"{where}: load_path is {path}: convert it with `mnemos checkpoint convert FOLDER DIR --from olmo`, leave"
            " load_path out, and give --init-from DIR (weights alone) or --resume DIR"
        )
    sizes = read_model(content["model"], where)
    base = olmo2_1b() if sizes.backbone.model_type == "olmo2" else olmo_1b()
    optimizer: Section = content.get("optimizer") or {}
    data: Section = content.get("data") or {}
    length = int(content["model"].get("max_sequence_length", DEFAULTS["max_sequence_length"]))
    rows = _count(content, "global_train_batch_size", where, 512, least=1)
    micro = _count(content, "device_train_microbatch_size", where, 16, least=1)
    z_loss = number(content.get("auxiliary_loss_multiplier", 1e-4), f"{where}: auxiliary_loss_multiplier")
    betas = optimizer.get("betas", (0.9, 0.95))
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise UserError(f"{where}: optimizer.betas is {shown(betas)}: give two numbers")
    precision = content.get("precision", "fp32")
    if precision not in PRECISIONS:
        raise UserError(f"{where}: precision is {shown(precision)}: give one of {', '.join(PRECISIONS)}")
    recompute = content.get("activation_checkpointing")
    if recompute not in (None, "whole_layer"):
        raise UserError(f"{where}: activation_checkpointing is {shown(recompute)}: give whole_layer, or null")
    compiled = content.get("compile")
    if compiled is not None and not isinstance(compiled, dict):
        raise UserError(f"{where}: compile is {shown(compiled)}: give it as a section, or null")
    run_name = content.get("run_name")
    keep = _count(content, "save_num_checkpoints_to_keep", where, -1, least=-1)
    clip = content.get("max_grad_norm")
    return replace(
        base,
        model=dataclasses.replace(
            sizes,
            decay_norms=_switch(optimizer, "decay_norm_and_bias", f"{where}: optimizer"),
            decay_embeddings=_switch(optimizer, "decay_embeddings", f"{where}: optimizer"),
            z_loss=z_loss if _switch(content, "softmax_auxiliary_loss", where) else 0.0,
        ),
        sequence_length=length,
        batch_size=min(micro, rows),
        grad_accum=1,
        global_batch_size=rows,
        weight_decay=number(optimizer.get("weight_decay", 0.01), f"{where}: optimizer.weight_decay"),
        clip=0.0 if clip is None else number(clip, f"{where}: max_grad_norm"),
        precision=PRECISIONS[precision],
        dry_run=_switch(content, "dry_run", where),
        seed=_count(content, "seed", where, 6198),
        run_name=None if run_name is None or folder is not None else str(run_name),
        output_dir=base.output_dir if folder is None else folder,
        activation_checkpointing=recompute is not None,
        compile=compiled is not None,
        save_every=_count(content, "save_interval", where, 1000),
        eval_every=_count(content, "eval_interval", where, 1000),
        keep=LARGEST if keep < 0 else keep,
        optimizer__betas=tuple(number(beta, f"{where}: optimizer.betas") for beta in betas),
        optimizer__eps=number(optimizer.get("eps", 1e-5), f"{where}: optimizer.eps"),
        **_schedule(content, rows * length, where),
        data__tokenizer=base.data.tokenizer if tokenizer is None else tokenizer,
        data__eos_id=eos_id,
        **_data(data, where),
    )


def _folder(content: Section) -> Path | None:
    """The run directory that `save_folder` means; None where it is on another machine, or an expression."""
    found = content.get("save_folder")
    return None if not isinstance(found, str) or not found or "://" in found or "${" in found else Path(found)


def _tokenizer(content: Section) -> str | None:
    """The tokenizer that the file names, as `--data.tokenizer` takes it; None where it names none, or one that is not
    here."""
    section = content.get("tokenizer")
    name = section.get("identifier") if isinstance(section, dict) else None
    return (
        TOKENIZERS.get(Path(name).name) if isinstance(name, str) and name.endswith(".json") else tokenizer_name(content)
    )


def _schedule(content: Section, tokens: int, where: str) -> dict[str, Any]:
    """The fields of the schedule and its length; `tokens`: those of a step."""
    section, optimizer = content.get("scheduler") or {}, content.get("optimizer") or {}
    name = section.get("name", "cosine_with_warmup")
    if name not in SCHEDULES:
        raise UserError(f"{where}: scheduler.name is {shown(name)}: give one of {', '.join(SCHEDULES)}")
    if optimizer.get("name", "lionw") != "adamw":
        raise UserError(f"{where}: optimizer.name is {shown(optimizer.get('name', 'lionw'))}: only adamw is supported")
    unit = section.get("units", "steps")
    if unit not in ("steps", "tokens"):
        raise UserError(f"{where}: scheduler.units is {shown(unit)}: give steps or tokens")

    def steps(value: Any, what: str) -> int:
        # Of the schedule, every number is in its units.
        in_tokens = what.startswith("scheduler") and unit == "tokens"
        return steps_of(value, f"{where}: {what}", tokens, in_tokens=in_tokens)

    peak = number(optimizer.get("learning_rate", 1e-4), f"{where}: optimizer.learning_rate")
    if peak <= 0:
        raise UserError(
            f"{where}: optimizer.learning_rate is {shown(optimizer['learning_rate'])}: give a value above 0"
        )
    start = section.get("warmup_min_lr")
    # OLMo's own default: a tenth of the peak.
    share = 0.1 if start is None else number(start, f"{where}: scheduler.warmup_min_lr") / peak
    duration = steps(content.get("max_duration", 10_000), "max_duration")
    # A constant schedule has no end.
    ends = section.get("t_max") is not None and SCHEDULES[name] != "constant"
    length = steps(section["t_max"], "scheduler.t_max") if ends else None
    stop = duration if content.get("stop_at") is None else min(duration, _count(content, "stop_at", where, 0, least=1))
    if length is not None and length < stop:
        raise UserError(
            f"{where}: scheduler.t_max is {shown(section['t_max'])}, {length} steps, and training goes on to {stop}:"
            " here it ends with its schedule: raise t_max, or lower max_duration to it"
        )
    return {
        "lr": peak,
        "steps": duration if length is None else length,
        # Also at the end of a schedule that has a length of its own: --max-duration leaves that length.
        "stop_after": stop if length is not None or stop < duration else None,
        "warmup_steps": 0 if name == "constant" else steps(section.get("t_warmup", 100), "scheduler.t_warmup"),
        "optimizer__schedule": SCHEDULES[name],
        "optimizer__warmup_start": share,
        "optimizer__min_lr_ratio": number(section.get("alpha_f", 0.1), f"{where}: scheduler.alpha_f"),
    }


def _data(section: Section, where: str) -> dict[str, Any]:
    """The fields of the data."""
    paths = section.get("paths") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UserError(f"{where}: data.paths is {shown(paths)}: give a list of files")
    found: dict[str, Any] = {"data__document_mask": _switch(section, "generate_doc_lengths", f"{where}: data")}
    if paths:
        dtype = section.get("memmap_dtype", "uint16")
        if dtype not in ("uint16", "uint32"):
            raise UserError(f"{where}: data.memmap_dtype is {shown(dtype)}: give uint16 or uint32")
        found |= {"data__tokens": tuple(paths), "data__token_dtype": dtype}
    return found


def _name_others(content: Section, where: str, *, folder: Path | None, tokenizer: str | None) -> None:
    """Prints one line that names the fields which have no effect here. `folder`, `tokenizer`: what was taken."""
    others = [key for key in content if key not in READ[""] | WITHOUT_EFFECT[""]]
    for name in SECTIONS:
        known = READ[name] | WITHOUT_EFFECT.get(name, set())
        others += [f"{name}.{key}" for key in content.get(name) or {} if key not in known]
    if content.get("save_folder") is not None and folder is None:
        others.append("save_folder")
    named = content.get("tokenizer")
    if isinstance(named, dict):
        taken = {"truncate_direction", *(("identifier",) if tokenizer is not None else ())}
        others += [f"tokenizer.{key}" for key in named if key not in taken]
    if isinstance(content.get("compile"), dict):
        others += [f"compile.{key}" for key in content["compile"]]
    cutoff = content["model"].get("init_cutoff_factor")
    # Without one, OLMo's `mitchell` takes the same as here, and its `normal` none.
    if cutoff != CUTOFF and not (cutoff is None and content["model"].get("init_fn") == "mitchell"):
        others.append(f"model.init_cutoff_factor (weights are cut off at {CUTOFF:g} standard deviations)")
    if others and os.environ.get("RANK", "0") == "0":
        log_line(f"{where}: no effect here: {', '.join(others)}")


def _count(content: Section, key: str, where: str, default: int, least: int = 0) -> int:
    found = whole(content.get(key, default), f"{where}: {key}", least)
    if found > LARGEST:
        raise UserError(f"{where}: {key} is {shown(content[key])}: give at most {LARGEST}")
    return found


def _switch(section: Section, key: str, where: str) -> bool:
    value = section.get(key)
    if value not in (None, True, False):
        raise UserError(f"{where}: {key} is {shown(value)}: give true or false")
    return bool(value)


def _resolved(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The content with every `${section.key}` of a field that is read in place of what it refers to, as OmegaConf has
    it. Raises UserError for a reference that leads nowhere."""

    def value(key: str, found: Any) -> Any:
        for _ in range(len(content)):
            match = re.fullmatch(r"\$\{([\w.]+)\}", found) if isinstance(found, str) else None
            if match is None:
                break
            target: Any = content
            for part in match[1].split("."):
                target = target.get(part) if isinstance(target, dict) else None
            if target is None:
                raise UserError(f"{where}: {key} is {shown(found)}, which the file does not have: give its value")
            found = target
        if isinstance(found, str) and "${" in found:
            raise UserError(f"{where}: {key} is {shown(found)}: give its value, or leave it out")
        return found

    resolved = {key: value(key, found) if key in READ[""] else found for key, found in content.items()}
    for name in SECTIONS:
        section = resolved.get(name) or {}
        known = READ[name]
        resolved[name] = {
            key: value(f"{name}.{key}", found) if key in known else found for key, found in section.items()
        }
    return resolved
