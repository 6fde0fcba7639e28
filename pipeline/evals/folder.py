"""`eval FOLDER --suite downstream`: tasks of a model that transformers loads, or of OLMo's layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import MANIFEST
from pipeline.commands.flags import pop_flag
from pipeline.downstream.logits_scorer import LogitsScorer
from pipeline.downstream.tasks import writes_text
from pipeline.errors import UserError
from pipeline.evals.suites import DOWNSTREAM, Chosen, chosen_tasks
from pipeline.host.hardware import on_gpu
from pipeline.inference.load import load
from pipeline.lm.olmo_folder import is_native
from pipeline.parallel.topology import Topology
from pipeline.runtime.ranks import describe_devices
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation


def is_model_folder(path: Path) -> bool:
    """Whether a folder is a model without a run: as `save_pretrained` writes it, or of OLMo's layout."""
    return not (path / MANIFEST).is_file() and ((path / "config.json").is_file() or is_native(path))


def evaluate_folder(path: Path, chosen: Chosen, flags: Sequence[str]) -> tuple[Evaluation, Mapping[str, Any]]:
    """The scores, and what they were measured on. `flags`: what follows on the command line besides the suite's own.
    Raises UserError."""
    if chosen.name != DOWNSTREAM:
        raise UserError(f"{path}: is no checkpoint of a run, whose data is held out: give --suite {DOWNSTREAM}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{path}: a model without a run is evaluated by one process: start it without a launcher")
    tokenizer, rest = pop_flag(list(flags), "--data.tokenizer")
    if rest:
        raise UserError(f"{rest[0]}: {path} is no checkpoint of a recipe, whose flags these are: leave it out")
    topology = Topology()
    loaded = chosen_tasks(chosen.values, topology)
    model, text = load(path, tokenizer=tokenizer)
    model.to("cuda" if on_gpu() else "cpu")
    scorer = LogitsScorer(model, text.eos_id, getattr(model.config, "max_position_embeddings", None))
    from pipeline.downstream.harness_model import HarnessModel
    from pipeline.downstream.scores import as_evaluation, score_tasks
    from pipeline.inference.texts import decoder_of

    decoder = decoder_of(model) if writes_text(loaded) else None
    harness_model = HarnessModel(scorer, text, SyncPoint(topology), decoder)
    scores = score_tasks(loaded, harness_model, chosen.values.get("--limit"))
    return as_evaluation(scores), {"machine": describe_devices(topology), "folder": path.name}
