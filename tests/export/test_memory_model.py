"""Models with memory as exported folders: through the gate, and with the code that is installed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from pipeline.capabilities import Exports
from pipeline.config import RunConfig
from pipeline.export.code import HASH, carry_code
from pipeline.export.gate import case_of, compare
from pipeline.inference.load import load
from pipeline.inference.trained import Trained
from pipeline.lm.auto_classes import register_auto_classes
from pipeline.systems.miras.causal_lm import MnemosConfig, MnemosForCausalLM
from pipeline.systems.miras.causal_lm_config import MODEL_TYPE
from tests.launch.parity_main import attached, mixed
from tests.systems.miras.harness import built
from tests.systems.miras.test_causal_lm import tied

MODELS: dict[str, Callable[[], RunConfig]] = {
    "titans": lambda: tied(attached("residual")),
    "full": lambda: attached("mal", "full", rule="moneta"),
    "mlp": lambda: attached("mac", rule="mlp"),
    "swiglu": lambda: attached("mag", rule="swiglu"),
    "mixed": mixed,
}
"""Every attachment, and a rule of every kind, with tied embeddings and without."""


def trained(config: RunConfig, dtype: torch.dtype = torch.float32) -> Trained:
    system, model = built(config, dtype=dtype)
    return Trained(Path(), config, {}, system, model.eval(), ())


def write(model: Any, folder: Path) -> None:
    folder.mkdir()
    carry_code(model, folder)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    place, found = tmp_path_factory.mktemp("exported"), {}
    for name, config in MODELS.items():
        found[name] = trained(config())
        assert isinstance(found[name].system, Exports)
        write(found[name].system.exported(found[name].model), place / name)
    return place, found


def test_a_process_with_transformers_alone_computes_the_same(folders: tuple[Path, dict[str, Trained]]) -> None:
    """By the trained system's own forward pass, of every block; and a weight that is another one is found."""
    place, models = folders
    cases = [case_of(model, place / name, None) for name, model in models.items()]
    other = models["mixed"]
    with torch.no_grad():
        other.model.get_parameter("memory.1.core.out_gate").mul_(1.5)
    cases.append(case_of(other, place / "mixed", None))
    *same, changed = compare(cases)
    for name, difference in zip(models, same, strict=True):
        assert difference.problem is None, (name, difference.problem)
        assert difference.class_name == "MnemosForCausalLM"
        assert {"embedding", "block 0", "block 1", "last norm", "logits"} <= difference.by_place.keys()
    assert changed.problem is not None and "block 1" in changed.problem


def test_the_installed_code_takes_the_folder_too(folders: tuple[Path, dict[str, Trained]]) -> None:
    """Without running the code in it."""
    place, models = folders
    register_auto_classes()
    ids = torch.arange(40)[None]
    for trust in (None, False, True):
        found: Any = AutoModelForCausalLM.from_pretrained(place / "titans", trust_remote_code=trust)
        assert type(found) is MnemosForCausalLM
    own: Any = models["titans"].system
    with torch.no_grad():
        expected = own.exported(models["titans"].model)(ids).logits
        assert torch.equal(found(ids).logits, expected)
        assert torch.equal(load(place / "titans", tokenizer="bytes").model(ids).logits, expected)


def test_what_the_installed_class_saves_names_no_code(folders: tuple[Path, dict[str, Trained]], tmp_path: Path) -> None:
    """There is none in its folder, which the installed class takes, whatever is trusted."""
    place, _ = folders
    register_auto_classes()
    for trust in (False, True):
        model: Any = AutoModelForCausalLM.from_pretrained(place / "titans", trust_remote_code=trust)
        model.save_pretrained(tmp_path / str(trust))
        settings = json.loads((tmp_path / str(trust) / "config.json").read_text())
        assert HASH in json.loads((place / "titans" / "config.json").read_text())
        assert not {"auto_map", HASH} & settings.keys() and not list(tmp_path.rglob("*.py"))
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / str(trust), trust_remote_code=True)
        assert type(again) is MnemosForCausalLM


def test_the_folder_says_nothing_of_where_it_was_made(folders: tuple[Path, dict[str, Trained]], tmp_path: Path) -> None:
    """Same bytes again, whatever backends the run had chosen."""
    place, _ = folders
    config: Any = MODELS["titans"]()
    attention = dataclasses.replace(config.model.attention, backend="sdpa")
    memory = dataclasses.replace(config.model.memory, backend="torch")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention, memory=memory))
    again = trained(config)
    assert isinstance(again.system, Exports)
    write(again.system.exported(again.model), tmp_path / "again")
    names = {path.name for path in (place / "titans").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "modeling_mnemos.py"} <= names
    for name in names:
        assert (place / "titans" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    settings = json.loads((place / "titans" / "config.json").read_text())
    assert settings["auto_map"] == {
        "AutoConfig": "modeling_mnemos.MnemosConfig", "AutoModelForCausalLM": "modeling_mnemos.MnemosForCausalLM"
    }  # fmt: skip


def test_importing_the_module_registers_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
    assert MODEL_TYPE not in CONFIG_MAPPING
    monkeypatch.delitem(sys.modules, "pipeline.export.hf", raising=False)
    importlib.import_module("pipeline.export.hf")
    assert CONFIG_MAPPING[MODEL_TYPE] is MnemosConfig
    assert MODEL_FOR_CAUSAL_LM_MAPPING[MnemosConfig] is MnemosForCausalLM
