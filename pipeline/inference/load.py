"""A trained model and its tokenizer, in an ordinary Python process: `from pipeline.lm import load`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data_config import DataConfig
from pipeline.errors import UserError, brief
from pipeline.files.given_path import expanded

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from pipeline.config import RunConfig
    from pipeline.data.tokenizer import Tokenizer

GIVE = "give a checkpoint, a run directory, a folder of OLMo's layout, or one of save_pretrained"
NAME_TOKENIZER = "give load(..., tokenizer=NAME)"


Read = tuple[Any, DataConfig, Callable[[], dict[str, str]]]
"""A model, the data that it was trained on, and what tells of the tokenizers of its token files (`makers_of`)."""


class Loaded(NamedTuple):
    """`model`: a causal language model of transformers, in evaluation mode on the CPU; with a memory it is a
    `MnemosForCausalLM`, and a `Decoded` for a system that transformers has no class of. `model(ids).logits` are [batch,
    sequence, vocabulary] of ids [batch, sequence]; there may be more of them than the tokenizer has ids.
    `tokenizer`: `encode(text)` gives ids [tokens] without special tokens, `decode(ids)` the text."""

    model: Any
    tokenizer: Tokenizer


def load(path: str | Path, *, tokenizer: str | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """The model and the tokenizer in a folder: a checkpoint of this program, a run directory for its newest one, a
    native folder of OLMo (`step1000-unsharded`), or a folder as `save_pretrained` writes it.

    `tokenizer`: in place of the one that belongs to the model, as `--data.tokenizer` takes it. `dtype`: of the weights;
    None: float32. No code that comes with a model or a tokenizer is run. Raises UserError
    for a folder that is none of these, and for a system that cannot generate text.
    """
    import torch

    from pipeline.checkpoint.manifest import pointed
    from pipeline.data.run_tokenizer import run_tokenizer
    from pipeline.data.tokenizer import load_tokenizer
    from pipeline.host.hardware import choose_accelerator
    from pipeline.inference.quiet import quiet_transformers
    from pipeline.lm.olmo_folder import is_native

    choose_accelerator()
    folder, dtype = pointed(expanded(path)), dtype or torch.float32
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder: {GIVE}")
    if (folder / "config.json").is_file():
        read = _hugging_face
    else:
        read = _native if is_native(folder) else _checkpoint
    with quiet_transformers():
        model, data, makers = read(folder, dtype)
    if tokenizer is not None:
        return Loaded(model.eval(), load_tokenizer(tokenizer))
    return Loaded(model.eval(), run_tokenizer(data, model.config.vocab_size, makers(), fix=NAME_TOKENIZER))


def _checkpoint(folder: Path, dtype: torch.dtype) -> Read:
    from pipeline.capabilities import Exports, Generates
    from pipeline.checkpoint.loader_state import makers_at
    from pipeline.checkpoint.restore import TRAINER_STATE, read_progress
    from pipeline.inference.decoded import Decoded
    from pipeline.inference.trained import find, load_trained, read_run
    from pipeline.system import create_system

    checkpoint = find(folder, GIVE)
    config = read_run(checkpoint)
    system = create_system(config)
    if (checkpoint / TRAINER_STATE).is_file():
        system.reached = read_progress(checkpoint).phase
    model: Any
    if isinstance(system, Exports):
        model = system.exported(load_trained(checkpoint, config, system).model)
    elif isinstance(system, Generates):
        model = Decoded(system, load_trained(checkpoint, config, system).model)
    else:
        raise UserError(f"{checkpoint}: {no_text(config)}")
    return model.to(dtype), config.data, functools.partial(makers_at, checkpoint)


def _native(folder: Path, dtype: torch.dtype) -> Read:
    from pipeline.capabilities import TrainsDecoder
    from pipeline.lm.olmo_folder import MODEL, read_weights
    from pipeline.system import create_system

    config = native_run(folder, model_alone=True)
    system = create_system(config)
    assert isinstance(system, TrainsDecoder), "what reads OLMo's files makes such a system"
    decoder = system.decoder_config()
    model = _filled(decoder, read_weights(folder, decoder), dtype, str(folder / MODEL))
    return model, config.data, dict


def _hugging_face(folder: Path, dtype: torch.dtype) -> Read:
    from transformers import AutoModelForCausalLM

    from pipeline.lm.auto_classes import register_auto_classes

    register_auto_classes()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a damaged file raises whatever it meets
        raise UserError(f"{folder}: no model can be loaded ({brief(error)}): copy or save it again") from error
    model, found = loaded
    # transformers fills these with random numbers, and only warns.
    missing = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}: save it again")
    return model, DataConfig(tokenizer=str(folder)), dict


def native_run(folder: Path, *, model_alone: bool = False) -> RunConfig:
    """The run that the config.yaml of a native folder means, with its tokenizer where that is one of here; with
    `model_alone`, whatever it says of the training. Raises UserError."""
    from pipeline.lm.olmo_config import DROPOUTS
    from pipeline.lm.olmo_folder import CONFIG, check_native, read_config
    from pipeline.recipes import read_foreign

    check_native(folder)
    content = read_config(folder)
    if model_alone and isinstance(content.get("model"), dict):
        # Of the training, fields that this program takes.
        untrained = {
            **dict.fromkeys(DROPOUTS, 0.0),
            "init_fn": "mitchell",
            "init_std": 0.02,
            "init_cutoff_factor": None,
        }
        kept = {key: content[key] for key in ("tokenizer",) if key in content}
        content = {**kept, "model": {**content["model"], **untrained}, "optimizer": {"name": "adamw"}}
    # Where that training began and left its files is nothing to one that goes on from the folder.
    elsewhere = {"load_path": None, "save_folder": None, "dry_run": False}
    run = read_foreign({**content, **elsewhere}, str(folder / CONFIG))
    if run is None:
        raise UserError(f"{folder / CONFIG}: has no `model` section of OLMo's: give a folder as OLMo writes it")
    return run


def no_text(config: RunConfig) -> str:
    """What is wrong with a checkpoint of a system that writes no text, and the fix."""
    return (
        f"of the recipe {config.recipe}, whose model does not generate text: give a checkpoint of one that does;"
        " evaluate this one with `mnemos eval`"
    )


def _filled(config: PreTrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype, where: str) -> Any:
    """The decoder with these weights by transformers' names. Raises UserError unless they are its own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, found = kind.from_pretrained(
        None, config=copy.deepcopy(config), state_dict=weights, dtype=dtype, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            first = sorted(map(str, found[what]))[0]
            raise UserError(f"{where}: {brief(first)} ({what.replace('_', ' ')}): it is of another model")
    return model
