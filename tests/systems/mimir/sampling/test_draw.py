"""`generate` of a checkpoint of peptides, and sample sheets: what is drawn, what is said of it, what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.config import RunConfig, replace
from pipeline.inference import draw
from pipeline.parallel.topology import Topology
from pipeline.recipes.mimir import mimir_tiny
from pipeline.runtime.sync import SyncPoint
from pipeline.system import create_system
from pipeline.systems.mimir.config import EncoderConfig, MimirConfig
from pipeline.systems.mimir.data.encode import decode
from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.uniform import UniformKernel
from pipeline.systems.mimir.model import ModelOutput
from pipeline.systems.mimir.sampling.batch import Conditions, Settings, bound_batch, draw_batch
from pipeline.systems.mimir.sampling.draw import BUDGET, Wanted, draw_peptides
from pipeline.systems.mimir.sampling.options import PeptideOptions
from pipeline.systems.mimir.sampling.sheet import sample_sheet
from tests.inference.checkpoints import checkpoint

SIZES: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2}
RESIDUES = range(8, 21)
"""Lengths of the synthetic peptides."""


def config(**changes: Any) -> RunConfig:
    """Of a small model of synthetic peptides, with what its data decides."""
    tiny = mimir_tiny()
    model: Any = dataclasses.replace(tiny.model, **{**SIZES, **changes})
    run = replace(tiny, model=model, data=dataclasses.replace(tiny.data, dataset="synthetic:400"))
    return create_system(run).settled(Topology())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by the way in which targets are told."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = {"target": "encoder", "encoder": EncoderConfig(8, 1, 64), "kernel": "absorbing", "timesteps": 20}
    for name, changes in {"table": {}, "encoder": {**encoder, "length": "head"}}.items():
        path = folder / name / "checkpoints" / "checkpoint-5"
        checkpoint(path, config(**changes))
        path.with_name("latest").write_text("checkpoint-5\n")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the command; what it prints, and its line on stderr."""

    def run(*words: Any, code: int = 0) -> tuple[str, str]:
        assert main(["generate", *map(str, words)]) == code
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        return out, line

    return run


def test_peptides_are_a_function_of_the_seed(runs: dict[str, Path]) -> None:
    options: dict[str, Any] = {"number": 7, "target": "T0003", "seed": 2, "novelty": False}
    rows = draw(runs["table"], **options)
    assert len({row["sequence"] for row in rows}) == 7
    assert all(row["target"] == "T0003" and row["label"] == 1 for row in rows)
    assert draw(runs["table"] / "checkpoints" / "latest", **options) == rows
    parts = draw(runs["table"], **options, batch_size=3)
    assert [row["sequence"] for row in parts] == [row["sequence"] for row in rows]
    assert [row["nats"] for row in parts] == pytest.approx([row["nats"] for row in rows], rel=1e-9)
    assert [row["sequence"] for row in draw(runs["table"], **{**options, "seed": 3})] != [r["sequence"] for r in rows]
    short = draw(runs["table"], **options, min_length=9, max_length=10)
    assert {len(row["sequence"]) for row in short} <= {9, 10} and all(len(r["sequence"]) in RESIDUES for r in rows)
    # Each of these changes what is drawn.
    for change in ({"target": "T0004"}, {"guidance": 3.0}, {"temperature": 0.3}, {"steps": 3}):
        assert [r["sequence"] for r in draw(runs["table"], **{**options, **change})] != [r["sequence"] for r in rows]


def test_the_command_prints_what_python_gets(runs: dict[str, Path], said: Any) -> None:
    words = (runs["table"], "-n", 4, "--target", "T0003", "--seed", 2)
    rows = draw(runs["table"], number=4, target="T0003", seed=2)
    out, line = said(*words)
    heading, *lines = out.splitlines()
    assert heading.split() == ["sequence", "label", "target", "length", "bits/residue", "novel", "edits", "nearest"]
    assert [text.split()[0] for text in lines] == [row["sequence"] for row in rows]
    assert line.startswith("mnemos: drew 4 peptides in ")
    training = create_system(config()).peptides.training  # type: ignore[attr-defined]
    known = decode(training.letters, training.lengths, mimir_tiny().model.letters)  # type: ignore[attr-defined]
    for row in rows:
        assert row["nearest"] in known and (row["edits"] > 0) == (row["novel"] == "yes")
    for name in ("new.csv", "new.fasta"):
        out, line = said(*words, "--output", name)
        assert out == "" and line.endswith(f"; written to {name}")
        assert all(row["sequence"] in Path(name).read_text() for row in rows)
    out, line = said(runs["table"], "-n", 2, "--non-interacting", "-t", "T0003", "--likelihood", 0, "--no-novelty")
    assert "background" in out and "bits" not in out and "have no target: drawn without one" in line


def test_a_target_may_be_one_that_training_never_saw(runs: dict[str, Path], said: Any) -> None:
    by_name = draw(runs["encoder"], number=3, target="T0002", novelty=False)
    system: Any = create_system(config(target="encoder"))
    known = dict(zip(system.peptides.target_names, system.peptides.target_sequences, strict=True))
    by_sequence = draw(runs["encoder"], number=3, target_sequence=known["T0002"].lower(), novelty=False)
    assert [row["sequence"] for row in by_sequence] == [row["sequence"] for row in by_name]
    others = draw(runs["encoder"], number=3, target_sequence="MKWVTFISLLFLFSSAYS", novelty=False, guidance=2.0)
    assert [row["sequence"] for row in others] != [row["sequence"] for row in by_name]
    assert said(runs["encoder"], "-n", 2, "--order", "random", "--no-novelty")[0].count("\n") == 3


def test_what_cannot_be_done_is_refused(runs: dict[str, Path], said: Any) -> None:
    model = runs["table"]
    for words, named in {
        (model, "-n", 0): "-n 0: give 1 or more",
        (model, "--target", "T003"): "--target T003: not among the ",
        (model, "--target", "P53"): "targets of this model, such as T0000, T0001",
        (model, "--min-length", 12, "--max-length", 9): "--min-length 12 is above --max-length 9",
        (model, "--max-length", 21): "--max-length 21: peptides of this model have 4 to 20 residues",
        (model, "--max-length", 5): "--min-length 4 --max-length 5: the model has seen no peptide of these lengths",
        (model, "--steps", 11): "--steps 11: the model has 10 timesteps",
        (model, "--order", "random"): "--order random: only the absorbing kernel",
        (model, "--target-sequence", "MK"): "this model knows targets by their names alone",
        (runs["encoder"], "--target", "T0"): "--target T0: not among the 32 targets",
        (model, "--prompt", "a"): "--prompt: mimir_tiny goes on from no text: leave it out",
        (model, "--targets", "a"): "unknown flag --targets: did you mean --target?",
        (model, "-o", "no/new.csv"): "--output no/new.csv: there is no folder no",
    }.items():
        out, line = said(*words, code=2)
        assert out == "" and named in line, words
    assert "did you mean T00" in said(model, "--target", "T003", code=2)[1]


def test_peptides_are_of_the_average_or_of_the_last_weights(tmp_path: Path, said: Any) -> None:
    both, weights = tmp_path / "both", tmp_path / "weights"
    checkpoint(both, config(), averaged=True)
    checkpoint(weights, config())
    options: dict[str, Any] = {"number": 4, "novelty": False}
    average, last = draw(both, **options), draw(both, **options, raw_weights=True)
    assert last == draw(weights, **options) == draw(weights, **options, raw_weights=True)
    assert average != last
    out, _ = said(both, "-n", 4, "--no-novelty", "--raw-weights")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [row["sequence"] for row in last]


def test_help_is_that_of_the_model(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", str(runs["table"]), "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "--prompt" not in out
    for field in dataclasses.fields(PeptideOptions):
        assert f"--{field.name.replace('_', '-')}" in out


def test_without_its_data_a_model_draws_all_the_same() -> None:
    run = config()
    gone = replace(run, data=dataclasses.replace(run.data, dataset=None, path=("gone.csv",)))
    system: Any = create_system(gone)
    model = system.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    drawn = system.draw(model.eval(), PeptideOptions(number=2, target="T0001"))
    assert "; novelty is not known: gone.csv does not exist" in drawn.said
    assert [row["nearest"] for row in drawn.rows] == [None, None]


class Constant:
    """A system that says the same of every residue and length; its peptides have residues of the first letters."""

    def __init__(self, noise: Kernel, shares: Tensor, **sizes: Any) -> None:
        self.kernel, self.shares = noise, shares
        self.sizes = MimirConfig(letters="ABCDEF"[: len(shares)], **sizes)

    def predict(self, model: nn.Module, states: Tensor, t: Tensor, lengths: Tensor, *_: Any) -> ModelOutput:
        lengths = torch.zeros(len(states), self.sizes.max_length + 1)
        return ModelOutput(self.shares.log().expand(*states.shape, -1), lengths)


def test_the_bound_of_a_denoiser_that_knows_the_composition_alone() -> None:
    """Where residues are independent and revealed one after the other the bound is the likelihood itself."""
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    system: Any = Constant(AbsorbingKernel(6, 3), shares, kernel="absorbing", timesteps=6, min_length=1, max_length=6)
    letters, lengths = torch.tensor([[0] * 6, [2, 2, 2, 0, 0, 0]]), torch.tensor([6, 3])
    none = torch.full((2,), -1)
    found = bound_batch(system, nn.Identity(), Conditions(none, none), letters, lengths, repeats=2)
    assert found.tolist() == pytest.approx([-6 * math.log(0.5), -3 * math.log(0.2)], rel=1e-6)


class Lengths(Constant):
    """Peptides of no label are of each length as often; of a label, 2 is the likeliest."""

    def predict(self, model: nn.Module, states: Tensor, t: Tensor, lengths: Tensor, *told: Any) -> ModelOutput:
        logits = super().predict(model, states, t, lengths).logits
        shares = torch.tensor([[0.0, 0.25, 0.25, 0.25, 0.25], [0.0, 0.2, 0.5, 0.2, 0.1]])
        return ModelOutput(logits, shares.log()[(told[0] >= 0).long()])


@pytest.mark.parametrize(("kind", "guidance"), [("head", 0.0), ("head", 1.0), ("head", 2.5), ("empirical", 2.5)])
def test_guidance_is_of_the_lengths_of_a_head_too(kind: Any, guidance: float) -> None:
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    sizes: Any = {"timesteps": 2, "min_length": 1, "max_length": 4, "length": kind}
    system: Any = Lengths(UniformKernel(2, 2), shares, **sizes)
    conditions = Conditions(torch.ones(4000, dtype=torch.int64), torch.full((4000,), -1))
    _, lengths = draw_batch(system, nn.Identity(), conditions, Settings(1, 4, guidance=guidance), seed=0,
                            domain="test", draw=torch.arange(4000))  # fmt: skip
    wanted = torch.tensor([0.2, 0.5, 0.2, 0.1]) ** (guidance if kind == "head" else 1.0)
    found = lengths.bincount(minlength=5)[1:] / 4000
    torch.testing.assert_close(found, wanted / wanted.sum(), rtol=0, atol=0.03)


def test_a_model_with_few_peptides_gives_each_once() -> None:
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    system: Any = Constant(UniformKernel(3, 2), shares, timesteps=3, min_length=2, max_length=2)
    model, wanted = nn.Linear(1, 1), Wanted(1)
    found = draw_peptides(system, model, wanted, PeptideOptions(number=10, batch_size=4))
    assert sorted(map(tuple, found.letters.tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found.drawn == 10 * BUDGET
    found = draw_peptides(system, model, wanted, PeptideOptions(number=10, batch_size=4, unique=False))
    assert len(found.letters) == found.drawn == 10


def test_a_sheet_has_peptides_of_each_kind_and_leaves_the_model_as_it_was() -> None:
    system: Any = create_system(config())
    model = system.build()
    system.initialise(model, Topology())
    model.train()
    sheet = sample_sheet(system, model, 3, SyncPoint(Topology()))
    assert model.training and sheet == sample_sheet(system, model, 3, SyncPoint(Topology()))
    _, *rows = sheet.splitlines()
    kinds = [row.split()[1:3] if "interacting" in row else row.split()[1:2] for row in rows]
    assert len(rows) == 20 and [kind[0] for kind in kinds[:4]] == ["background"] * 4
    assert [kind[1] for kind in kinds[8:]] == [f"T000{target}" for target in range(3) for _ in range(4)]
    assert sheet != sample_sheet(system, model, 4, SyncPoint(Topology()))
