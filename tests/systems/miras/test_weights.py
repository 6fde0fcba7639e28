"""Pretrained weights: those of the model's own files, from a folder or the hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Olmo2Config, Olmo2ForCausalLM

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import INDEX, SINGLE
from pipeline.recipes.miras import miras_tiny
from pipeline.systems.miras import create
from pipeline.systems.miras.config import BackboneConfig, MirasConfig
from pipeline.systems.miras.weights import backbone_config, pretrained_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OLMo2 in several shards, as transformers saves it."""
    folder = tmp_path_factory.mktemp("olmo")
    config = Olmo2Config(**SIZES, pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    Olmo2ForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file() and len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "olmo"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def run_of(folder: Path) -> RunConfig:
    config = miras_tiny()
    assert isinstance(config.model, MirasConfig)
    changed = dataclasses.replace(config.model.backbone, pretrained=str(folder))
    return replace(config, model=dataclasses.replace(config.model, backbone=changed), parallel__sequence=1)


def test_an_older_save_in_the_folder_changes_no_weight(folder: Path) -> None:
    """Once the last name won, in silence: token losses were up to 5.6 nats off."""
    expected = {name: load_file(stored.file)[name] for name, stored in pretrained_tensors(backbone(folder)).items()}
    save_file({name: torch.full_like(value, 7.0) for name, value in expected.items()}, folder / "older.safetensors")
    system = create(run_of(folder))
    model = system.build()
    system.initialise(model, Topology())
    found = {name.removeprefix("backbone."): value for name, value in model.named_parameters()}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def backbone(folder: Path) -> BackboneConfig:
    return BackboneConfig(pretrained=str(folder))


def test_weights_that_are_not_whole_are_refused_before_a_rank_starts(folder: Path) -> None:
    system = create(run_of(folder))
    system.check(Topology())
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{shard.name}: cannot be read"):
        system.check(Topology())


def test_sizes_of_another_model_are_named_with_the_file(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "intermediate_size": 32}))
    system = create(run_of(folder))
    model = system.build()
    with pytest.raises(UserError, match=r"--model.backbone.pretrained .*mlp.* in model-.*\.safetensors is \(24, 16\)"):
        system.initialise(model, Topology())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": "abc"}, "no usable config.json there"),
        ({"hidden_size": 0}, "hidden_size in its config.json is 0"),
        ({"num_attention_heads": -2}, "num_attention_heads in its config.json is -2"),
        ({"num_attention_heads": 3}, "do not divide one another"),
        ({"vocab_size": 10**40}, "vocab_size in its config.json"),
        ({"model_type": "llama"}, "its model type is 'llama', not 'olmo2'"),
        ({"model_type": "x" * 5000}, "no usable config.json there"),
        ({"tie_word_embeddings": True}, "ties its embeddings"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError) as caught:
        backbone_config(backbone(folder))
    message = str(caught.value)
    assert reason in message and "\n" not in message and len(message) < 400


class Hub:
    """Stands in for the hub: a folder that is handed out by patterns."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache = source, cache / "snapshots" / ("c0ffee" * 7)[:40]
        self.asked: list[tuple[str, list[str]]] = []

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.asked.append((revision, sorted(allow_patterns)))
        self.cache.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for path in self.source.glob(pattern):
                (self.cache / path.name).write_bytes(path.read_bytes())
        return str(self.cache)


def test_of_a_hub_name_the_models_own_files_are_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": torch.zeros(2)}, folder / "consolidated.safetensors")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    hub = Hub(folder, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    found = pretrained_tensors(BackboneConfig(pretrained="someone/olmo", revision="main"))
    assert found["lm_head.weight"].shape == (300, 16)
    # The shards of the very commit that the index is of.
    assert hub.asked == [("main", ["*.json"]), (hub.cache.name, shards)]


def test_a_hub_name_without_an_index_means_the_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "source" / SINGLE)
    hub = Hub(tmp_path / "source", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert set(pretrained_tensors(BackboneConfig(pretrained="someone/olmo"))) == {"x"}


def test_a_hub_that_does_not_answer_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"someone/olmo: cannot be downloaded \(ConnectionError\): give a local folder"):
        pretrained_tensors(BackboneConfig(pretrained="someone/olmo"))
