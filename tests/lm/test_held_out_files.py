"""Held-out files by name: each has the loss of its own text, all of it and none of another's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.lm.held_out_files import evaluate_files, named_files
from pipeline.lm.olmo_config import model_section
from pipeline.lm.olmo_layout import fused
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation
from pipeline.systems.olmo.model import OlmoModel
from tests.data.tokens.conftest import write
from tests.launch.olmo_cases import olmo
from tests.lm.olmo_reference import native_logits
from tests.systems.olmo.harness import built

LENGTH, EOS = 16, 256


def config(**changes: Any) -> RunConfig:
    """One row of LENGTH tokens a step, documents apart, of the stdlib that nothing here reads."""
    found = olmo("olmo", rows=1, length=LENGTH, vocabulary=260)
    return replace(found, data__document_mask=True, evaluation__steps=4, evaluation__batch_size=1, **changes)


def evaluated(run: RunConfig) -> tuple[Evaluation, OlmoModel]:
    system, model = built(run)
    model.train()
    first = evaluate_files(system, model, SyncPoint(Topology()))
    assert model.training
    again = evaluate_files(system, model, SyncPoint(Topology()))
    assert first == again, "each evaluation begins at the start"
    return first, model


def losses(model: OlmoModel, ids: Tensor) -> Tensor:
    """Of one document or window [tokens], by OLMo's rules, in float64: [tokens - 1]."""
    weights = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    section = model_section(model.backbone.config, vocabulary=260, eos=EOS, length=LENGTH)
    logits = native_logits(fused(weights, model.backbone.config), section, ids[None])[0]
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


@pytest.mark.parametrize("documents", [["a document..", "and"], ["fourteen bytes"]], ids=["two", "one"])
def test_a_file_has_the_loss_of_all_its_documents(documents: list[str], tmp_path: Path) -> None:
    """They fill the one sequence of the evaluation, each with its end."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "mine.jsonl").write_text(lines)
    (tmp_path / "other.txt").write_text("of another file")
    paths = (f"mine={tmp_path / 'mine.jsonl'}", f"other={tmp_path / 'other.txt'}")
    whole = [torch.tensor([*text.encode(), EOS]) for text in documents]
    run = replace(config(evaluation__path=paths), sequence_length=sum(map(len, whole)), data__shuffle=False)
    found, model = evaluated(replace(run, evaluation__steps=1))
    assert set(found.scalars) == {
        f"held_out/{name}/{key}" for name in ("mine", "other") for key in ("loss", "ppl", "bpb", "labels")
    }
    wanted = torch.cat([losses(model, ids) for ids in whole])
    assert found.scalars["held_out/mine/labels"] == len(wanted)
    assert found.scalars["held_out/mine/loss"] == pytest.approx(float(wanted.mean()), abs=1e-5)
    covered = sum(len(text) - 1 for text in documents)  # the first byte is no label, the end has none
    assert found.scalars["held_out/mine/bpb"] == pytest.approx(float(wanted.sum()) / math.log(2) / covered, abs=1e-5)


def test_a_token_file_is_read_whole_and_by_windows(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 4 * LENGTH + 3)
    run = config(evaluation__tokens=(f"mine={write(tmp_path / 'mine.npy', ids)}",))
    found, model = evaluated(replace(run, data__document_mask=False))
    windows = torch.from_numpy(ids[: 4 * LENGTH]).view(4, LENGTH)
    wanted = torch.cat([losses(model, window) for window in windows])
    assert found.scalars["held_out/mine/labels"] == 4 * (LENGTH - 1)
    assert found.scalars["held_out/mine/loss"] == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert found.scalars["held_out/mine/ppl"] == pytest.approx(math.exp(float(wanted.mean())), rel=1e-4)
    bits = float(wanted.sum()) / math.log(2) / (4 * (LENGTH - 1))
    assert found.scalars["held_out/mine/bpb"] == pytest.approx(bits, abs=1e-5), "an id is a byte"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation__path": ("books.jsonl",)}, "--evaluation.path books.jsonl: give NAME=FILE"),
        ({"evaluation__tokens": ("=a.npy",)}, "--evaluation.tokens =a.npy: give NAME=FILE"),
        ({"evaluation__tokens": ("a/b=a.npy",)}, "give NAME=FILE"),
        ({"evaluation__path": ("a=x", "a=y")}, "a is given twice"),
        ({"evaluation__path": ("a=x",), "evaluation__tokens": ("a=y",)}, "a is given twice"),
    ],
)
def test_a_file_without_a_name_of_its_own_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        named_files(config(**changes))
    system, _ = built(config())
    system.config = config(**changes)
    with pytest.raises(UserError, match=words):
        system.check(Topology())


@pytest.mark.parametrize(
    ("flag", "name", "content", "words"),
    [
        ("path", "gone.txt", None, "gone.txt does not exist: check the path"),
        ("tokens", "gone.npy", None, "gone.npy does not exist: check the path"),
        ("path", "text.pdf", b"x", "text.pdf ends in '.pdf'"),
        ("tokens", "short.npy", b"\1\0", "short.npy"),
        ("tokens", "ids.npy", b"\xff\xff" * 4 * LENGTH, "65535"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_before_training(
    flag: str, name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    """With its own flag, where the training data is opened: before the first step, and by `mnemos check`."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    system, model = built(config(**{f"evaluation__{flag}": (f"mine={tmp_path / name}",)}))
    with pytest.raises(UserError) as refusal:
        system.loader(system.phases(model)[0], Topology())
    message = str(refusal.value)
    assert message.startswith(f"--evaluation.{flag} mine: ") and words in message and "\n" not in message
    assert "--data.path" not in message and "--data.tokens" not in message
