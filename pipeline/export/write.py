"""What `export` writes: a whole model, which transformers loads, or a memory alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from pipeline.capabilities import Exports, HasMemory
from pipeline.checkpoint.files import new_folder
from pipeline.checkpoint.loader_state import makers_at
from pipeline.data.run_tokenizer import run_tokenizer
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError, brief
from pipeline.export.card import Facts, use_memory, use_model, write_card
from pipeline.export.code import carry_code
from pipeline.export.gate import Difference, attached_difference, case_of, compare
from pipeline.export.tokenizer_files import write_tokenizer
from pipeline.inference.quiet import quiet_transformers
from pipeline.inference.trained import Trained
from pipeline.lm.memory_folder import write_memory
from pipeline.system import System
from pipeline.units import human_bytes

SHARD = "5GB"
"""Bytes of a file of weights at the most."""
MARGIN = 2**24
"""Bytes set aside for all that is no weight."""

Load = Callable[[], Trained]


def check_out(out: Path, checkpoint: Path) -> None:
    """Raises UserError where a folder cannot be the new one: it holds something, or is part of the checkpoint."""
    if out.is_symlink():
        raise UserError(f"{out}: a link, which a new folder cannot take the place of: name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty: name a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file: name a new folder")
    if checkpoint.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out}: inside the checkpoint, which must stay as it is: name a folder elsewhere")
    above = next(parent for parent in out.parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{out}: {above} cannot be written: name another folder")


def export_model(load: Load, system: System[Any], out: Path, *, tokenizer: bool, given: str | None = None) -> str:
    """Writes a model as a folder that transformers loads, once it computes there what it does here; returns what was
    written, in words. `tokenizer`: whether one is written; `given`: its name, where the user says it. Raises UserError,
    with nothing left behind."""
    if not isinstance(system, Exports):
        alone = "; --memory-only writes its memory alone" if isinstance(system, HasMemory) else ""
        raise UserError(
            f"{system.config.recipe}: of the system {system.name}, which has no class that transformers loads: export"
            f" takes checkpoints of systems that have one{alone}"
        )
    trained = load()
    model = system.exported(trained.model)
    own = _tokenizer(trained, model, given) if tokenizer else None
    _end_texts(model, trained, own)
    with _writing(out, trained.model) as partial:
        carry_code(model, partial)
        with quiet_transformers():
            model.save_pretrained(partial, max_shard_size=SHARD)
        if own is not None:
            write_tokenizer(own, partial, int(model.config.max_position_embeddings))
        dtype, name = str(next(model.parameters()).dtype).removeprefix("torch."), type(model).__name__
        trusts_code = bool(getattr(model, "_auto_class", None)) or any(partial.glob("*.py"))
        # They share the parameters, which are made float32 for the comparison.
        del model
        (difference,) = compare([case_of(trained, partial, own)])
        _check(difference, out)
        facts = Facts(
            out.name,
            f"A `{name}`, trained with the recipe `{trained.config.recipe}`, step {trained.manifest['step']:,}. Weights"
            f" in {dtype}.",
            use_model(out.name, has_tokenizer=own is not None, trusts_code=trusts_code),
            f"When it was written, a process with transformers alone loaded this folder: its logits differ from the"
            f" trained model's by {difference.logits:.2g} at most, in float32, where the largest is"
            f" {difference.by_place['logits'][1]:.3g}{_of_tokenizer(own)}.",
        )
        write_card(trained, partial, facts)
    return f"a {name} of {human_bytes(_size(out))}, logits equal to {difference.logits:.1e}"


def export_memory(load: Load, system: System[Any], out: Path, *, tokenizer: bool, given: str | None = None) -> str:
    """Writes the memory of a model alone, once it is the trained model's where it is attached; as `export_model`."""
    if not isinstance(system, HasMemory):
        raise UserError(f"--memory-only: {system.config.recipe} has no memory: leave it out")
    system.check_memory_alone()
    trained = load()
    alone = system.memory_alone(trained.model)
    weights = {name: value for name, value in trained.model.state_dict().items() if name in alone.names}
    with _writing(out, trained.model) as partial:
        write_memory(partial, alone, weights)
        difference = attached_difference(trained, system.with_memory(str(partial)))
        _check(difference, out)
        count = sum(value.numel() for value in weights.values())
        facts = Facts(
            out.name,
            f"The memory of `{trained.config.recipe}`, step {trained.manifest['step']:,}: {count:,} parameters beside"
            f" `{alone.base['name'] or 'random weights'}`, whose hash is in memory.json. The backbone is not here.",
            use_memory(out.name, alone.flags),
            "When it was written, it was attached to the backbone again: every hidden state and logit is the trained"
            f" model's, to {max(d for d, _ in difference.by_place.values()):.2g}.",
            is_model=False,
        )
        write_card(trained, partial, facts)
    return f"a memory of {human_bytes(_size(out))}, logits equal to {difference.logits:.1e}"


def _check(difference: Difference, out: Path) -> None:
    if difference.problem is None:
        return
    if difference.by_place:
        print(difference.table())
    raise UserError(f"{out}: not exported: {difference.problem}")


def _tokenizer(trained: Trained, model: PreTrainedModel, given: str | None) -> Tokenizer | None:
    """That of the run; None where it read no text."""
    data = trained.config.data
    if data.recall is not None:
        return None
    fix = "give --data.tokenizer NAME, or --no-tokenizer"
    return run_tokenizer(data, int(model.config.vocab_size), makers_at(trained.checkpoint), given=given, fix=fix)


def _end_texts(model: PreTrainedModel, trained: Trained, tokenizer: Tokenizer | None) -> None:
    """Says where a text ends, in a config that does not."""
    eos = trained.config.data.eos_id if tokenizer is None else tokenizer.eos_id
    if eos is None:
        return
    config: Any = model.config
    generation: Any = model.generation_config
    for section in (config, generation):
        if section.eos_token_id is None:
            section.eos_token_id = eos
    if generation.pad_token_id is None:
        generation.pad_token_id = eos


def _of_tokenizer(tokenizer: Tokenizer | None) -> str:
    return "" if tokenizer is None else ", and its tokenizer gives the ids that training read"


@contextlib.contextmanager
def _writing(out: Path, model: nn.Module) -> Iterator[Path]:
    """A folder that takes the name `out` at the end, with room for the weights. Raises UserError for a full disk."""
    needed = MARGIN + sum(value.numel() * value.element_size() for value in model.state_dict().values())
    above = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(f"{out}: {human_bytes(free)} free, {human_bytes(needed)} needed: make room there")
    with new_folder(out) as partial:
        try:
            yield partial
        except SafetensorError as error:
            raise UserError(f"{out}: not written ({brief(error)}): make room there") from error
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
