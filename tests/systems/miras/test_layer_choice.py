"""Layers by number and by word, on backbones of any depth; and what each layer's memory is then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.flags import parse_run
from pipeline.config_file import load_config, save_config
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.recipes import all_recipes
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.layer_choice import Layers, chosen_layers
from pipeline.systems.miras.layer_kinds import by_layer, on_backbone
from tests.launch.parity_main import attached
from tests.lm.families import FAMILIES, save_decoder


@pytest.mark.parametrize(
    ("layers", "count", "numbers"),
    [
        (("upper4",), 30, (26, 27, 28, 29)),
        (("upper1",), 1, (0,)),
        (("upper3",), 3, (0, 1, 2)),
        (("every2",), 6, (1, 3, 5)),
        (("every2",), 5, (1, 3)),
        (("every7",), 16, (6, 13)),
        (("every1",), 3, (0, 1, 2)),
        (("every3",), 3, (2,)),
        ((1, 3), 4, (1, 3)),
        ((), 4, ()),
    ],
)
def test_a_word_stands_for_layers_of_any_backbone(layers: Layers, count: int, numbers: tuple[int, ...]) -> None:
    assert chosen_layers(layers, count) == numbers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("upper5",), "--model.memory.layers upper5: the backbone has 4 layers: give upper4, or a lower number"),
        (("every9",), "--model.memory.layers every9: the backbone has 4 layers: give every4, or a lower number"),
        (
            (2, 4),
            "--model.memory.layers 2 4: the backbone has layers 0 to 3: give some of these, or upperN for the last N",
        ),
        ((-1,), "--model.memory.layers -1: the backbone has layers 0 to 3: give some"),
        (("upper0",), "--model.memory.layers 'upper0': give layer numbers, or upperN for the last N layers,"),
        ((1, "two"), "--model.memory.layers 'two': give layer numbers, or upperN for the last N layers, everyN for"),
        (("upper2", 1), "--model.memory.layers upper2 1: give upper2 alone, or layer numbers"),
        ((1, 1), "--model.memory.layers 1 1: name each layer once"),
    ],
)
def test_what_no_backbone_has_is_refused_in_a_line(layers: Layers, message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen_layers(layers, 4)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_words_fit_pretrained_weights_of_every_family(name: str, tmp_path: Path) -> None:
    backbone = BackboneConfig(pretrained=str(save_decoder(name, tmp_path)))

    def system(*layers: Any) -> Any:
        config = attached("residual")
        assert isinstance(config.model, MirasConfig)
        memory = dataclasses.replace(config.model.memory, layers=layers)
        return create(
            dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone, memory=memory))
        )

    assert system("upper2").sizes.memory.layers == (1, 2)
    assert system("every2").sizes.memory.layers == (1,)
    with pytest.raises(UserError, match=r"memory.layers upper4: the backbone has 3 layers: give upper3, or a lower"):
        system("upper4")


def test_a_command_line_takes_the_words_and_a_run_file_keeps_them(tmp_path: Path) -> None:
    words = ["miras_tiny", "--model.memory.layers", "upper3", "--model.memory.overflow-layers", "2", "3"]
    config = parse_run(words, "train")
    assert isinstance(config.model, MirasConfig)
    assert (config.model.memory.layers, config.model.memory.overflow_layers) == (("upper3",), (2, 3))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", all_recipes()).model == config.model
    with pytest.raises(UserError, match=r"memory.layers upper5: the backbone has 4 layers: give upper4, or a lower"):
        parse_run(["miras_tiny", "--model.memory.layers", "upper5"], "train")


def test_the_memories_of_a_mixture_are_each_as_their_attachment_says() -> None:
    backbone = backbone_config(BackboneConfig(layers=4, width=32, heads=4, kv_heads=2, ffn=48, vocabulary=64))
    memory = MemoryConfig(layers=("upper3",), overflow_layers=("upper2",), heads=2, head_dim=16)
    resolved = on_backbone(MirasConfig(memory=memory), backbone).memory
    found = {
        layer: (kind.attachment, kind.heads, kind.head_dim) for layer, kind in by_layer(resolved, backbone).items()
    }
    assert found == {1: ("residual", 2, 16), 2: ("overflow", 4, 8), 3: ("overflow", 4, 8)}
    everywhere = on_backbone(MirasConfig(memory=dataclasses.replace(memory, attachment="overflow")), backbone).memory
    assert (everywhere.layers, everywhere.heads, everywhere.head_dim) == ((1, 2, 3), 4, 8)
    assert {kind.attachment for kind in by_layer(everywhere, backbone).values()} == {"overflow"}
