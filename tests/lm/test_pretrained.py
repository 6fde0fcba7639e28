"""Pretrained weights: those of the model's own files, from a folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.lm import pretrained
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import backbone_config, is_local, pretrained_tensors
from pipeline.parallel.weight_files import SINGLE
from tests.lm.small_olmo import save_olmo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_olmo(tmp_path / "olmo")


def backbone(folder: Path) -> BackboneConfig:
    return BackboneConfig(pretrained=str(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": "abc"}, "no usable config.json there"),
        ({"hidden_size": 0}, "hidden_size in its config.json is 0"),
        ({"num_attention_heads": -2}, "num_attention_heads in its config.json is -2"),
        ({"num_attention_heads": 3}, "do not divide one another"),
        ({"vocab_size": 10**40}, "vocab_size in its config.json"),
        (
            {"model_type": "gpt2"},
            "its model type is 'gpt2': give weights of one of llama, mistral, olmo, olmo2, qwen2, qwen3",
        ),
        ({"model_type": "x" * 5000}, "no usable config.json there"),
        ({"model_type": "llama", "head_dim": 0}, "head_dim in its config.json is 0"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of the type 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "it rotates 0.5 of each head"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError) as caught:
        backbone_config(backbone(folder))
    message = str(caught.value)
    assert reason in message and "\n" not in message and len(message) < 400


def test_a_home_is_put_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` stays as it is in a --config file and in quotes."""
    monkeypatch.setenv("HOME", str(folder.parent))
    named = BackboneConfig(pretrained="~/olmo")
    assert is_local(named) and backbone_config(named).to_dict() == backbone_config(backbone(folder)).to_dict()
    assert pretrained_tensors(named).keys() == pretrained_tensors(backbone(folder)).keys()


@pytest.mark.parametrize("name", ["~/none", "./none", "/none", "a/b/none"])
def test_a_path_that_leads_nowhere_is_said(name: str) -> None:
    with pytest.raises(UserError, match="no such folder or file: correct the path"):
        pretrained_tensors(BackboneConfig(pretrained=name))


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


def test_a_hub_name_that_proves_to_be_another_model_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folder, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    section = BackboneConfig(pretrained="someone/olmo", vocabulary=300)
    built = backbone_config(section)
    cached = backbone_config(backbone(folder))
    monkeypatch.setattr(pretrained, "_local_config", lambda config: cached)
    with pytest.raises(UserError, match="has hidden_size 16, and the model was built with 2048: start again"):
        pretrained_tensors(section, built)
    assert pretrained_tensors(section, cached)


def test_a_hub_that_does_not_answer_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"someone/olmo: cannot be downloaded \(ConnectionError\): give a local folder"):
        pretrained_tensors(BackboneConfig(pretrained="someone/olmo"))
