"""Every family of backbones on two sequence ranks: grouped heads are shared, and tied embeddings are one parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch.backbone_main import TIED
from tests.launch.forked import forked
from tests.lm.families import FAMILIES, decoder


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("backbones")
    done = forked(2, "tests.launch.backbone_main", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(result: dict[str, dict[str, Any]], name: str) -> None:
    assert result[name]["logits"] < 1e-5


@pytest.mark.parametrize("name", [*FAMILIES, "zero1"])
def test_gradients_are_those_of_transformers_and_an_update_moves_every_parameter(
    result: dict[str, dict[str, Any]], name: str
) -> None:
    found = result[name]
    assert found["gradients"] < 1e-4
    assert found["same names"] and found["every parameter moves"]


@pytest.mark.parametrize("name", [*FAMILIES, "zero1"])
def test_checkpoints_hold_a_tied_embedding_once(result: dict[str, dict[str, Any]], name: str) -> None:
    names = [key for key, _ in decoder(TIED if name == "zero1" else name).named_parameters()]
    assert result[name]["saved"] == sorted(f"backbone.{key}" for key in names)


def test_checkpoints_hold_no_frozen_embedding(result: dict[str, dict[str, Any]]) -> None:
    assert result["frozen"]["saved"] == []
