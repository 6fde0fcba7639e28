"""Checkpoints of runs on token files, made without training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import checksum
from pipeline.checkpoint.loader_state import LOADER_STATE
from pipeline.checkpoint.manifest import read_manifest, write_manifest
from pipeline.config import RunConfig
from pipeline.config_file import load_config, save_config
from pipeline.data.build import build_loader
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.tokens.loader import WindowLoader
from pipeline.data.tokens.sidecar import Sidecar, sidecar_path
from pipeline.files.output import write_json
from pipeline.parallel.topology import Topology
from pipeline.recipes import all_recipes
from tests.data.tokens.conftest import write


def tokenised(path: Path, texts: Sequence[str], tokenizer: str, *, sidecar: bool = True, **changes: Any) -> str:
    """A token file of some texts; `changes` are what its sidecar says otherwise."""
    made_by = load_tokenizer(tokenizer)
    ids = [int(i) for text in texts for i in [*made_by.encode(text), made_by.eos_id]]
    name = write(path, ids)
    if sidecar:
        facts = Sidecar(
            "uint16", len(ids), len(texts), made_by.vocab_size, made_by.eos_id, tokenizer, made_by.fingerprint, ""
        )
        write_json(sidecar_path(path), {**facts.to_json(), **changes})
    return name


def save_run(folder: Path, config: RunConfig, steps: int, vocab_size: int, **facts: Any) -> Path:
    """A checkpoint, without its weights, of a run that has read so many steps; or what such a one adds to the
    checkpoint that lies in the folder."""
    loader = build_loader(config, Topology(world=1), vocab_size=vocab_size)
    assert isinstance(loader, WindowLoader)
    for _ in range(steps):
        loader.next_step()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOADER_STATE).write_text(json.dumps(loader.state_dict()))
    save_config(config, folder / "config.yaml")
    before = read_manifest(folder) or {"files": {}, "step": steps, "global_batch": config.batch_size}
    files = {**before.pop("files"), **{name: checksum(folder / name) for name in (LOADER_STATE, "config.yaml")}}
    write_manifest(folder, {**before, **facts}, files)
    return folder


def trained_on(checkpoint: Path, tokens: Sequence[str], *, steps: int, vocab_size: int, **data: Any) -> Path:
    """The checkpoint, as if it were of a run that has read so many steps of token files."""
    config = load_config(checkpoint / "config.yaml", all_recipes())
    data = {"tokens": tuple(tokens), "tokenizer": "bytes", "eos_id": None, "token_dtype": "auto", **data}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    return save_run(checkpoint, config, steps, vocab_size)
