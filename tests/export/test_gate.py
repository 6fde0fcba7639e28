"""What a process with transformers alone computes with exported folders, whole and spoilt ones: one process for all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config import RunConfig
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from pipeline.export import gate, reload
from pipeline.export.gate import Case, Difference, case_of, compare, places
from pipeline.export.tokenizer_files import write_tokenizer
from pipeline.inference.trained import Trained
from tests.export.small_checkpoints import built, dense

GROUPED = {"kv_heads": 2}
KINDS: dict[str, tuple[RunConfig, torch.dtype]] = {
    "olmo, tied and clipped": (dense("olmo", tied=True, clip_qkv=0.6), torch.float32),
    "olmo2": (dense("olmo2"), torch.float32),
    "llama, tied": (dense("llama", tied=True, **GROUPED), torch.float32),
    "llama in bfloat16": (dense("llama"), torch.bfloat16),
    "mistral": (dense("mistral", **GROUPED), torch.float32),
    "qwen2": (dense("qwen2", **GROUPED), torch.float32),
    "qwen3": (dense("qwen3", **GROUPED), torch.float32),
}
"""Every family that a backbone may be of."""
CLASSES = {"olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM", "llama": "LlamaForCausalLM",
           "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def exported(folder: Path, config: RunConfig, dtype: torch.dtype = torch.float32) -> Case:
    system, model = built(config, dtype)
    system.exported(model).save_pretrained(folder)  # type: ignore[attr-defined]
    # transformers gives every folder of a qwen2 the tokenizer of Qwen 2, which normalises.
    tokenizer = None if folder.name == "qwen2" else ByteTokenizer()
    write_tokenizer(ByteTokenizer(), folder, config.sequence_length)
    return case_of(Trained(folder, config, {"step": 3}, system, model, ()), folder, tokenizer)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0, 0] += 0.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))


DEFAULT = {"rope_type": "default"}
SPOILT = {
    "another base of the frequencies": lambda f: change_config(f, rope_parameters={**DEFAULT, "rope_theta": 1e4 + 10}),
    "another epsilon": lambda f: change_config(f, rms_norm_eps=2e-5),
    "a weight of block 1": lambda f: change_weight(f, "model.layers.1.mlp.up_proj.weight"),
    "a weight of the head": lambda f: change_weight(f, "lm_head.weight"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "another end of text": lambda f: (f / "tokenizer_config.json").write_text(
        (f / "tokenizer_config.json").read_text().replace("<|endoftext|>", "b")
    ),
    "other ids": change_tokenizer,
}  # fmt: skip
"""What is done to the folder of an olmo2."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Difference]:
    root = tmp_path_factory.mktemp("exported")
    cases = {kind: exported(root / kind, config, dtype) for kind, (config, dtype) in KINDS.items()}
    whole = cases["olmo2"]
    for what, spoil in SPOILT.items():
        shutil.copytree(whole.folder, root / what)
        spoil(root / what)
        cases[what] = replace(whole, folder=root / what)
    cases["a qwen2 of bytes"] = replace(cases["qwen2"], tokenizer=ByteTokenizer())
    return dict(zip(cases, compare(list(cases.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_computes_the_same_in_its_own_class(found: dict[str, Difference], kind: str) -> None:
    difference = found[kind]
    assert difference.problem is None, difference.table()
    assert difference.class_name == CLASSES[kind.split(",")[0].split()[0]]
    assert list(difference.by_place) == ["embedding", "block 0", "last norm", "logits"]
    assert difference.logits < 1e-5 and difference.by_place["logits"][1] > 1
    assert difference.by_place["embedding"][0] == 0


@pytest.mark.parametrize(
    "what, said",
    [
        ("another base of the frequencies", "what differs first is block 0"),
        ("another epsilon", "what differs first is block 0"),
        ("a weight of block 1", "what differs first is last norm"),
        ("a weight of the head", "what differs first is the head"),
        ("no weights", "transformers does not load it (OSError"),
        ("another end of text", "ends a document with id"),
        ("other ids", "gives other ids for"),
        ("a qwen2 of bytes", "--no-tokenizer"),
    ],
)
def test_what_differs_is_said_by_block(found: dict[str, Difference], what: str, said: str) -> None:
    problem = found[what].problem
    assert problem is not None and said in problem and "\n" not in problem


def test_positions_are_the_first_ones_and_others_to_the_last() -> None:
    assert places(5) == (0, 1, 2, 3, 4)
    many = places(4096)
    assert len(many) <= gate.POSITIONS and many[:60] == tuple(range(60)) and many[-1] == 4095


def test_pieces_of_a_text_are_put_together_and_positions_taken_of_them() -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
            self.lm_head = nn.Identity()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for piece in hidden.split(3, 1):
                for layer in self.layers:
                    piece = layer(piece) + 1
                self.lm_head(piece)
            return hidden

    hidden = torch.arange(8.0).view(1, 8, 1)
    model = Pieces()
    states, given = reload.states_of(model, lambda: model(hidden), [0, 4, 7])
    assert given is hidden
    assert {name: value.flatten().tolist() for name, value in states.items()} == {
        "embedding": [0, 4, 7], "block 0": [1, 5, 8], "last norm": [2, 6, 9],
    }  # fmt: skip
    assert not model.lm_head._forward_pre_hooks


def test_a_process_that_ends_without_an_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.sys, "executable", "false")
    with pytest.raises(UserError, match="the process that loads it again ended"):
        compare([Case(tmp_path, torch.zeros(1, 1, dtype=torch.long), (0,), {})])


def test_values_that_are_no_numbers_are_no_equality() -> None:
    nan = torch.tensor([[float("nan")]])
    assert gate._problem({"logits": gate._largest(nan, nan)}) is not None
