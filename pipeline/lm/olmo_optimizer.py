"""The optim.pt of a native folder: AdamW's moments by OLMo's names, fused as the weights are.

OLMo writes torch's `state_dict` with the names of the parameters beside their numbers (one process, DDP), or with the
names in place of the numbers (FSDP). Both are read; the first is written, which OLMo reads in either case.
Source: github.com/allenai/OLMo, olmo/optim.py (get_param_groups) and olmo/checkpoint.py
(FullCheckpointer._make_optim_state_dict_compatible).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import UserError, shown
from pipeline.files.pickle_file import read_pickle
from pipeline.lm.olmo_folder import FIX, OPTIMIZER
from pipeline.lm.olmo_layout import join, layout, split

MOMENTS = ("exp_avg", "exp_avg_sq")
WRAPPER = "_fsdp_wrapped_module."
"""What FSDP puts into names."""


@dataclass(frozen=True)
class AdamSettings:
    """What OLMo keeps in each group."""

    lr: float
    """Of the last update."""
    peak_lr: float
    betas: tuple[float, float]
    eps: float
    clip: float | None
    """Largest gradient norm; None: no clipping."""


@dataclass(frozen=True)
class AdamState:
    """AdamW's state of a decoder by transformers' names: for each of MOMENTS the tensors, the updates that they have
    seen, and the weight decay. A parameter that was never updated has 0 updates, and its moments do not count."""

    moments: Mapping[str, Mapping[str, Tensor]]
    steps: Mapping[str, float]
    decay: Mapping[str, float]
    settings: AdamSettings


def optimizer_content(state: AdamState, config: PreTrainedConfig, where: str) -> dict[str, Any]:
    """The content of optim.pt. Raises UserError, which begins with `where`, where parameters that OLMo fuses differ in
    their updates or decay."""
    names, settings = layout(config), state.settings
    updates: dict[str, float] = {}
    decay: dict[str, float] = {}
    for name, parts in names.items():
        for found, values in ((updates, state.steps), (decay, state.decay)):
            different = {values[part] for part in parts}
            if len(different) > 1:
                raise UserError(
                    f"{where}: the parts of {name!r} differ in their updates or weight decay ({sorted(different)}), and"
                    " OLMo has one for all: this run has no native layout"
                )
            found[name] = different.pop()
    number = 0
    content: dict[str, Any] = {"state": {}, "param_groups": []}
    # As OLMo makes its groups: what is decayed first, each sorted by name.
    for value in sorted(set(decay.values()), reverse=True):
        group = sorted(name for name in names if decay[name] == value)
        numbers = range(number, number + len(group))
        number += len(group)
        content["param_groups"].append({
            "lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": value, "amsgrad": False,
            "foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None,
            "initial_lr": settings.peak_lr, "sharded": False, "max_grad_norm": settings.clip,
            "max_grad_norm_ratio": None, "param_names": group, "params": list(numbers),
        })  # fmt: skip
        for name, key in zip(group, numbers, strict=True):
            if updates[name]:
                moments = {kind: join(state.moments[kind], names[name]) for kind in MOMENTS}
                content["state"][key] = {"step": torch.tensor(updates[name], dtype=torch.float32), **moments}
    return content


def read_optimizer(folder: Path, config: PreTrainedConfig) -> AdamState | None:
    """The state in a native folder; None where it has no optim.pt. Raises UserError unless it is AdamW's, of the
    decoder."""
    path = folder / OPTIMIZER
    if not path.is_file():
        return None
    content = read_pickle(path, fix=FIX, mmap=True)
    try:
        states, decay = _by_name(content)
        settings = _settings(content["param_groups"][0])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: holds no optimizer's state with the names of its parameters: {FIX}") from error
    names = layout(config)
    unknown = next((name for name in {**states, **decay} if name not in names), None)
    if unknown is not None:
        raise UserError(f"{path}: {shown(unknown)} is no parameter of the model in config.yaml: {FIX}")
    for name, state in states.items():
        missing = next((key for key in ("step", *MOMENTS) if key not in state), None)
        if missing is not None:
            raise UserError(f"{path}: has no {missing!r} of {name!r}: only the state of AdamW can be read")
    parts = {name: tuple(names[name]) for name in states}
    steps = dict.fromkeys((part for pieces in names.values() for part in pieces), 0.0)
    steps |= {part: float(states[name]["step"]) for name, pieces in parts.items() for part in pieces}
    decays = {part: decay.get(name, 0.0) for name, pieces in names.items() for part in pieces}
    moments = {}
    for kind in MOMENTS:
        found = {name: state[kind] for name, state in states.items()}
        moments[kind] = split(found, config, str(path), partial=True)
    return AdamState(moments, steps, decays, settings)


def _by_name(content: Any) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """States and weight decay by OLMo's names."""
    named: dict[Any, str] = {}
    decay: dict[str, float] = {}
    for group in content["param_groups"]:
        keys = group["params"]
        given = keys if all(isinstance(key, str) for key in keys) else group["param_names"]
        for key, name in zip(keys, given, strict=True):
            named[key] = name.replace(WRAPPER, "")
            decay[named[key]] = float(group.get("weight_decay", 0.0))
    return {named[key]: dict(state) for key, state in content["state"].items()}, decay


def _settings(group: Any) -> AdamSettings:
    first, second = group["betas"]
    clip = group.get("max_grad_norm")
    return AdamSettings(
        lr=float(group["lr"]), peak_lr=float(group.get("initial_lr", group["lr"])), betas=(float(first), float(second)),
        eps=float(group["eps"]), clip=None if clip is None else float(clip),
    )  # fmt: skip
