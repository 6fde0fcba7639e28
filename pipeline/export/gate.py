"""Whether an exported folder, loaded by transformers alone in a process of its own, computes what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine import building
from pipeline.errors import UserError, brief, shown
from pipeline.export import reload
from pipeline.inference.trained import Trained
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import file_tensors
from pipeline.system import StepContext, System

TOLERANCE = 1e-5
"""Largest difference of a logit, as a share of the largest logit, and no less than of 1."""
TOKENS = 1024
"""Tokens that are read, or two windows where that is more; a training sequence at the most."""
POSITIONS = 128
"""Positions that are compared: the first tokens, where few see a memory, and others up to the last."""
TEXTS = (
    "The  quick\tbrown\n\n    fox_jumps(over=13.37) l'été, Straße, 日本語, Ελληνικά, \U0001f9e0\r\n",
    "def load(path):\n    return open(path).read()\n",
    " ", " leading and trailing ", "e\u0301 \ufb01 \uff21 \u00a0x\u200b",
)  # fmt: skip
"""What both tokenizers have to give the same ids for. None spells a special token, which training has as ordinary text
and a tokenizer that is copied need not."""


@dataclass(frozen=True)
class Case:
    """A folder, and what it has to compute."""

    folder: Path
    ids: Tensor
    """[1, tokens] int64."""
    positions: tuple[int, ...]
    states: Mapping[str, Tensor]
    """Of the trained model, as `reload.states_of`, with its `logits`."""
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Difference:
    """The largest differences of what a folder computes: by place, in the order of the model, and where it matters."""

    by_place: Mapping[str, tuple[float, float]]
    """Of each place the difference, and the largest value of the trained model."""
    class_name: str
    problem: str | None = None
    """Why it is not what was trained; None: it is."""

    @property
    def logits(self) -> float:
        return self.by_place["logits"][0]

    def table(self) -> str:
        """A line a place."""
        rows = [f"{'place':<12} {'difference':>12} {'of at most':>12}"]
        return "\n".join([*rows, *(f"{name:<12} {d:>12.3e} {m:>12.3e}" for name, (d, m) in self.by_place.items())])


def case_of(trained: Trained, folder: Path, tokenizer: Tokenizer | None) -> Case:
    """What the folder of a model has to compute: the trained model's own forward pass in float32, which it is left in.

    One row of random ids, as one document.
    """
    system, model, config = trained.system, trained.model.float(), trained.config
    window = getattr(getattr(config.model, "attention", None), "window", 0)
    tokens = min(config.sequence_length, max(TOKENS, 2 * window))
    head = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == reload.HEAD)
    assert isinstance(head, nn.Linear)
    ids = torch.randint(head.out_features, (1, tokens), generator=torch.Generator().manual_seed(1))
    positions = places(tokens)
    order = torch.arange(tokens).unsqueeze(0)
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORED)], 1)
    batch = TokenBatch(ids, labels, torch.zeros_like(ids), order, torch.zeros(1, dtype=torch.long))
    context = StepContext(Topology(), config.seed, "export", 1)
    states, _ = reload.states_of(model, lambda: system.forward(model, batch, {}, context), positions)
    with torch.no_grad():
        states["logits"] = F.linear(states[reload.LAST], head.weight, head.bias)
    return Case(folder, ids, positions, states, tokenizer)


def attached_difference(trained: Trained, attached: System[Any]) -> Difference:
    """Of what a trained model computes, and what the system of the same run does, whose memory is read from a folder.

    Both are built here, in the precision of the weights, and compared in float32.
    """
    with building({}, next(trained.model.parameters()).dtype):
        model = attached.build()
    attached.initialise(model, Topology())
    again = replace(trained, system=attached, model=model.eval())
    expected, found = (case_of(each, Path(), None).states for each in (trained, again))
    by_place = {name: _largest(found[name], value) for name, value in expected.items()}
    return Difference(by_place, type(model).__name__, _problem(by_place))


def places(tokens: int) -> tuple[int, ...]:
    """The positions that are compared in a text of so many tokens, in order."""
    half = POSITIONS // 2
    spread = {round(index * (tokens - 1) / half) for index in range(half + 1)}
    return tuple(sorted(spread | set(range(min(half - 1, tokens)))))


def compare(cases: Sequence[Case]) -> list[Difference]:
    """Loads the folders in one process of their own, which has transformers and not this project, and compares.

    Raises UserError where that process ends without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="mnemos-export-") as temporary:
        place = Path(temporary)
        request = [
            {
                "folder": str(case.folder.absolute()),
                "out": str(place / str(number)),
                "ids": case.ids.tolist(),
                "positions": case.positions,
                "texts": TEXTS if case.tokenizer is not None else (),
            }
            for number, case in enumerate(cases)
        ]
        (place / "request.json").write_text(json.dumps(request))
        # As text: from a file, Python would look for modules beside it.
        source = Path(reload.__file__).read_text()
        done = subprocess.run(
            [sys.executable, "-c", source, str(place / "request.json")],
            cwd=place, env=_environment(place), capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"{cases[0].folder}: the process that loads it again ended ({brief(last)}): start again")
        return [_compared(case, place / str(number)) for number, case in enumerate(cases)]


def _environment(place: Path) -> dict[str, str]:
    """Without the network, and without what earlier exports have left in transformers' cache of code."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules"), "PYTHONSAFEPATH": "1"}


def _compared(case: Case, out: Path) -> Difference:
    facts: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    if "error" in facts:
        return Difference({}, "", f"transformers does not load it ({brief(facts['error'])})")
    stored = file_tensors(out.with_suffix(".safetensors"))
    found: dict[str, tuple[float, float]] = {}
    for name, expected in case.states.items():
        if name in stored and stored[name].shape == tuple(expected.shape):
            found[name] = _largest(stored[name].read(name), expected)
    kind = str(facts["class"])
    if "logits" not in found:
        shape = stored["logits"].shape if "logits" in stored else None
        return Difference(
            found, kind, f"its logits are {shape}, those of the trained model {case.states['logits'].shape}"
        )
    problem, other = _problem(found), _other_tokens(case, facts)
    if problem is None and other is not None:
        problem = f"{other}: give --no-tokenizer for the model alone"
    return Difference(found, kind, problem)


def _largest(found: Tensor, expected: Tensor) -> tuple[float, float]:
    # NaN is no equality.
    difference = (found - expected).abs().max().nan_to_num(float("inf"))
    return float(difference), float(expected.abs().max())


def _problem(found: Mapping[str, tuple[float, float]]) -> str | None:
    difference, largest = found["logits"]
    if difference <= TOLERANCE * max(1.0, largest):
        return None
    first = next((name for name, (d, m) in found.items() if d > TOLERANCE * max(1.0, m)), "logits")
    where = "the head" if first == "logits" else first
    return (
        f"its logits differ from the trained model's by {difference:.2g}, of at most {largest:.2g}; what differs first"
        f" is {where}, by {found[first][0]:.2g}"
    )


def _other_tokens(case: Case, facts: Mapping[str, Any]) -> str | None:
    if case.tokenizer is None:
        return None
    if facts["eos"] != case.tokenizer.eos_id:
        return f"its tokenizer ends a document with id {facts['eos']}, and training did with {case.tokenizer.eos_id}"
    for text, tokens, again in zip(TEXTS, facts["tokens"], facts["texts"], strict=True):
        expected = case.tokenizer.encode(text).tolist()
        if tokens != expected:
            return f"its tokenizer gives other ids for {shown(text)}: {shown(tokens)}, and not {shown(expected)}"
        if again != case.tokenizer.decode(expected):
            return f"its tokenizer gives another text for the ids of {shown(text)}: {shown(again)}"
    return None
