"""Files that come from outside, damaged at random: a reader takes them or says in one line which file is wrong.

A traceback is a fault of the project, whatever a crash, an editor or another program made of a file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Olmo2Config

from pipeline import cli
from pipeline.callbacks.metrics import MetricsFile, read_rows
from pipeline.checkpoint.compatibility import check_resumable
from pipeline.checkpoint.finished import nothing_left
from pipeline.checkpoint.locate import locate_checkpoint
from pipeline.checkpoint.manifest import with_checksum
from pipeline.checkpoint.restore import restore
from pipeline.checkpoint.trainable import load_trainable
from pipeline.commands.checkpoint import run_checkpoint
from pipeline.config import replace
from pipeline.config_file import load_config, save_config, to_plain
from pipeline.ds_config import CONFIG_FOLDER, deepspeed_config
from pipeline.errors import UserError
from pipeline.launch.hosts import read_hostfile
from pipeline.lm.config import BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import INDEX, SINGLE, model_tensors, open_safetensors
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.system import Evaluation
from tests.checkpoint.small_runs import a_run, save
from tests.mutations import mutations

Mutants = Iterable[tuple[str, bytes]]


def check(path: Path, mutants: Mutants, read: Callable[[], object], named: str = "") -> tuple[int, int]:
    """Reads every mutant in place of `path`, whose content is put back; returns how many were taken and refused.

    `named`: what a refusal names, if not the file.
    """
    valid = path.read_bytes()
    taken = refused = 0
    try:
        for what, content in mutants:
            path.write_bytes(content)
            try:
                read()
                taken += 1
            except UserError as error:
                message = str(error)
                assert (named or path.name) in message, f"{what}: {path.name} is not named: {message}"
                assert "\n" not in message and len(message) < 1200, f"{what}: {message}"
                refused += 1
            except BaseException:
                print(f"{path.name}, mutation {what}")
                raise
    finally:
        path.write_bytes(valid)
    return taken, refused


def without_depth(mutants: Mutants, count: int) -> Iterator[tuple[str, bytes]]:
    """The first `count` that nest nothing, for a parser in Python, which takes a second for thousands of levels."""
    return itertools.islice(((what, content) for what, content in mutants if "nest" not in what), count)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights, in two shards, with the config of a small model."""
    folder = tmp_path / "weights"
    folder.mkdir()
    shards = {"1.safetensors": {"a": torch.ones(3), "b": torch.ones(2, 2)}, "2.safetensors": {"c": torch.ones(4)}}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    config = Olmo2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    config.save_pretrained(folder)
    return folder


def read_all(folder: Path) -> None:
    for name, stored in model_tensors(folder).items():
        with open_safetensors(stored.file) as handle:
            assert tuple(handle.get_tensor(name).shape) == stored.shape


def test_weights_and_their_index(weights: Path) -> None:
    for name, count in ((INDEX, 80), ("1.safetensors", 80)):
        path = weights / name
        _, refused = check(path, mutations(path.read_bytes(), count, seed=11), lambda: read_all(weights))
        assert refused > count / 2
    (weights / INDEX).unlink()
    shutil.copy(weights / "2.safetensors", weights / SINGLE)
    check(weights / SINGLE, mutations((weights / SINGLE).read_bytes(), 40, seed=12), lambda: read_all(weights))


def test_the_config_of_pretrained_weights(weights: Path) -> None:
    path = weights / "config.json"
    backbone = BackboneConfig(pretrained=str(weights))
    taken, refused = check(path, mutations(path.read_bytes(), 60, seed=13), lambda: backbone_config(backbone))
    assert taken and refused


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nworker-1 slots=8\nworker-2 slots=4  # half\n\n10.0.0.3 slots=1\n")
    taken, refused = check(path, mutations(path.read_bytes(), 150, seed=14), lambda: read_hostfile(str(path)))
    assert taken and refused


def test_a_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    config = dataclasses.replace(miras_tiny(), zero=str(path))
    for name in ("zero0", "zero2", "zero3_offload"):
        path.write_bytes((CONFIG_FOLDER / f"{name}.json").read_bytes())
        taken, refused = check(path, mutations(path.read_bytes(), 70, seed=15), lambda: deepspeed_config(config))
        assert taken and refused


def test_a_config(tmp_path: Path) -> None:
    path, recipes = tmp_path / "config.yaml", all_recipes()
    save_config(miras_tiny(), path)
    check(path, without_depth(mutations(path.read_bytes(), 60, seed=16), 40), lambda: load_config(path, recipes))
    # JSON is YAML: values of every type in place of every other.
    path.write_text(json.dumps(to_plain(miras_tiny())))
    mutants = without_depth(mutations(path.read_bytes(), 240, seed=17), 160)
    taken, refused = check(path, mutants, lambda: load_config(path, recipes))
    assert taken and refused


def test_metrics_never_stop_a_resume(tmp_path: Path) -> None:
    run = a_run(tmp_path, step=4)
    metrics = MetricsFile(run)
    for step in range(6):
        metrics.on_evaluation(step, Evaluation({"loss": 2.5, "bpb": 1.25, "memory_off/loss": 2.75}))

    def resume() -> None:
        rows = read_rows(metrics.path)
        assert all(type(row["step"]) is int for row in rows)
        metrics.on_start()
        kept = [json.loads(line) for line in metrics.path.read_text().splitlines()]
        assert kept == [row for row in rows if row["step"] <= 4]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check(metrics.path, mutations(metrics.path.read_bytes(), 200, seed=18), resume) == (200, 0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The newer of two checkpoints of a run whose model is one linear layer."""
    run = a_run(tmp_path / "run")
    save(run, 5)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "stopped", "last_checkpoint": "checkpoint-5"}))
    return save(run, 10)


def resume(checkpoint: Path) -> None:
    """All that reads a checkpoint before training goes on from it."""
    run = a_run(checkpoint.parents[1])
    found = locate_checkpoint(run.config)
    assert found == checkpoint
    check_resumable(run.config, found)
    restore(run, found)
    load_trainable(torch.nn.Linear(3, 2), found, Topology())
    assert run.progress.step == 10


def everything(checkpoint: Path) -> None:
    run_checkpoint(["list", str(checkpoint.parents[1])])
    run_checkpoint(["list", str(checkpoint.parents[1]), "--json"])
    resume(checkpoint)
    nothing_left(a_run(checkpoint.parents[1]).config, checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json", "loader.json", "trainable.safetensors"])
def test_a_file_of_a_checkpoint(checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / name
    _, refused = check(path, mutations(path.read_bytes(), 50, seed=19), lambda: everything(checkpoint))
    assert refused


@pytest.mark.parametrize("name", ["checkpoints/latest", "run.json"])
def test_what_a_resume_does_not_go_by(checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.parents[1] / name
    assert check(path, mutations(path.read_bytes(), 40, seed=20), lambda: everything(checkpoint)) == (40, 0)


def test_a_manifest_that_somebody_else_sealed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever makes a checkpoint available writes its manifest, with the hash that belongs to it."""
    path = checkpoint / "manifest.json"

    def mutants() -> Iterator[tuple[str, bytes]]:
        for what, content in mutations(path.read_bytes(), 360, seed=21):
            try:
                value = json.loads(content)
                yield what, json.dumps(with_checksum(value)).encode() if isinstance(value, dict) else content
            except (ValueError, RecursionError):
                continue

    def read() -> None:
        run_checkpoint(["list", str(checkpoint.parents[1])])
        run = a_run(checkpoint.parents[1])
        check_resumable(run.config, checkpoint)
        restore(run, checkpoint)

    found = list(mutants())
    assert len(found) >= 100
    taken, refused = check(path, found, read, named=checkpoint.name)
    assert taken and refused


class TestThroughTheCommandLine:
    """Exit code 0 or 2, and for 2 one line that names the file."""

    @pytest.fixture(autouse=True)
    def one_rank(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)

    def answers(self, name: str, code: int, err: str, what: str) -> None:
        assert code in (0, 2), f"{what}: {err}"
        assert "Traceback" not in err
        if code == 2:
            lines = [line for line in err.splitlines() if line.startswith("mnemos: ")]
            assert len(lines) == 1, f"{what}: {err}"
            # A value of a config that only the machine or the ranks refuse is named by its flag.
            assert name in lines[0] or (name == "config.yaml" and "--" in lines[0]), f"{what}: {err}"

    @pytest.mark.parametrize("name", ["config.yaml", "mine.json", "manifest.json", SINGLE])
    def test_in_this_process(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
    ) -> None:
        words: list[str]
        path = tmp_path / name
        if name == "config.yaml":
            path.write_text(json.dumps(to_plain(replace(miras_recall(), output_dir=tmp_path / "out"))))
            words = ["check", "--config", str(path), "--launch-ranks", "2"]
        elif name == "mine.json":
            path.write_bytes((CONFIG_FOLDER / "zero2.json").read_bytes())
            words = ["check", "miras_recall", "--zero", str(path), "--output-dir", str(tmp_path / "out")]
        elif name == "manifest.json":
            path = request.getfixturevalue("checkpoint") / name
            words = ["checkpoint", "list", str(path.parents[2])]
        else:
            folder = request.getfixturevalue("weights")
            (folder / INDEX).unlink()
            path = folder / name
            shutil.copy(folder / "1.safetensors", path)
            words = ["check", "miras_recall", "--model.backbone.pretrained", str(folder), "--model.memory.layers", "1"]
        for what, content in without_depth(mutations(path.read_bytes(), 12, seed=22), 2):
            path.write_bytes(content)
            code = cli.main(words)
            self.answers(name, code, capsys.readouterr().err, what)

    @pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
    def test_in_a_process_of_its_own(self, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        if name == "config.yaml":
            path = tmp_path / name
            save_config(miras_tiny(), path)
            words = ["check", "--config", str(path)]
        else:
            path = request.getfixturevalue("checkpoint") / name
            words = ["checkpoint", "verify", "--quick", str(path.parent)]
        ((what, content),) = without_depth(mutations(path.read_bytes(), 9, seed=23), 1)
        path.write_bytes(content)
        command = [sys.executable, "-m", "pipeline", *words]
        done = subprocess.run(command, cwd=Path(cli.__file__).parents[1], capture_output=True, text=True)
        self.answers(name, done.returncode, done.stderr, what)


def test_a_mutant_that_brings_a_reader_down_is_seen(tmp_path: Path) -> None:
    """The check itself: a traceback, and a message without the file's name, fail it."""
    path = tmp_path / "file.json"
    path.write_text("{}")

    def unnamed() -> None:
        raise UserError("something is wrong")

    with pytest.raises(KeyError):
        check(path, mutations(b"{}", 1, seed=0), lambda: {}["absent"])
    with pytest.raises(AssertionError, match=r"file\.json is not named"):
        check(path, mutations(b"{}", 1, seed=0), unnamed)
    assert path.read_text() == "{}"
