"""Other ranks, another ZeRO stage, another split: numbers only move, and a run goes on as if uninterrupted."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.safe import load_pickle, weights_only
from tests.launch.forked import forked

SMALL = ["--sequence-length", "256", "--evaluation.steps", "1", "--eval-every", "0", "--report.no-plots"]
LAST = 6
PAIRS = 16
OTHERS = 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one and two ranks saved, converted, and what two ranks find when they load it."""
    folder = tmp_path_factory.mktemp("engines")
    done = forked(1, "tests.launch.elastic_main", str(folder), "save")
    assert done.returncode == 0, done.stdout + done.stderr
    done = forked(2, "tests.launch.elastic_main", str(folder), "save", "2-fp32", "1-bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def check(folder: Path, ranks: int, cases: int) -> None:
    found: dict[str, dict[str, bool]] = json.loads((folder / f"load-{ranks}.json").read_text())
    assert len(found) == cases + 1
    assert [(case, what) for case, facts in found.items() for what, holds in facts.items() if not holds] == []


def test_every_stage_loads_every_stage_on_the_same_and_on_more_ranks(saved: Path) -> None:
    check(saved, 2, 2 * (PAIRS + OTHERS))


def test_settings_that_order_shards_in_another_way_are_other_layouts(saved: Path) -> None:
    """DeepSpeed loads a shard by place: with another order it would give parameters the values of others."""
    kinds = ("zero1", "zero2", "zero3", "zero3-persistent")
    orders = [torch.load(saved / f"2-fp32-{kind}.pt", weights_only=True)["layout"]["order"] for kind in kinds]
    assert orders[0] == orders[1] == orders[3] != orders[2], "in sub-groups of 40"


def test_every_stage_loads_every_stage_on_one_rank(saved: Path) -> None:
    done = forked(1, "tests.launch.elastic_main", str(saved), "load", "2-fp32", "2-bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    check(saved, 1, 2 * (PAIRS + OTHERS))


def test_every_stage_loads_every_stage_on_ranks_that_divide_no_parameter(saved: Path) -> None:
    done = forked(4, "tests.launch.elastic_main", str(saved), "load", "2-fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    check(saved, 4, PAIRS)


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "zero3-persistent", "zero1-float32-sums"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_converter_of_deepspeed_finds_the_same(
    saved: Path, tmp_path: Path, precision: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.checkpoint import ds_to_universal

    source, theirs = tmp_path / "source", tmp_path / "theirs"
    shutil.copytree(saved / f"2-{precision}-{kind}", source)
    for path in source.glob("mp_rank_*_model_states.pt"):
        # DeepSpeed asks for what only trainers built on it write.
        torch.save({**load_pickle(path), "universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}, path)
    words = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with weights_only():
        ds_to_universal.main(
            Namespace(input_folder=str(source), output_folder=str(theirs), inject_missing_state=False, **words)
        )
    ours = saved / f"2-{precision}-{kind}.universal"
    # Below stage 3 theirs has buffers among the parameters, with a master and no moments.
    names = sorted(path.name for path in (theirs / "zero").iterdir() if path.is_dir() and path.name != "scale")
    assert names == sorted(path.name for path in (ours / "zero").iterdir() if path.is_dir())
    compared = 0
    for path in (path for name in names for path in (theirs / "zero" / name).iterdir()):
        expected, found = tensor(path), tensor(ours / path.relative_to(theirs))
        assert torch.equal(expected.reshape(found.shape), found), path
        compared += 1
    assert compared == len(names) * (3 if kind.startswith("zero3") else 4), "their ZeRO-3 leaves the step out"


def tensor(path: Path) -> torch.Tensor:
    content: Any = load_pickle(path)
    return torch.as_tensor(content["param"] if isinstance(content, dict) else content).float()


def train(folder: Path, ranks: int, *words: str) -> None:
    command = ["pipeline", "train", "miras_tiny", *SMALL, "--steps", str(LAST), "--output-dir", str(folder), *words]
    done = forked(ranks, *command)
    assert done.returncode == 0, done.stdout + done.stderr


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["mode"] == "train"]


def test_a_run_goes_on_elsewhere_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    one = ["--parallel.sequence", "1", "--zero", "zero1"]
    train(straight, 1, *one, "--batch-size", "2")
    # 2 ranks -> 1 -> 4; sequence degree 2 -> 1 -> 2; ZeRO 3 -> 1 -> 3; one micro-batch -> two -> one.
    train(moved, 2, "--batch-size", "2", "--stop-after", "2")
    train(moved, 1, *one, "--batch-size", "1", "--stop-after", "4", "--resume", "must")
    train(moved, 4, "--batch-size", "1", "--resume", "must")

    assert [row["step"] for row in rows(moved)] == list(range(1, LAST + 1))
    losses = [[row["loss"] for row in rows(run)] for run in (moved, straight)]
    print(f"largest relative difference of a loss: {max(abs(a / b - 1) for a, b in zip(*losses, strict=True)):.1e}")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key in ("tokens", "lr"):
        assert [row[key] for row in rows(moved)] == [row[key] for row in rows(straight)]
    ends = [folder / "checkpoints" / f"checkpoint-{LAST}" for folder in (straight, moved)]
    cursors = [json.loads((end / "loader.json").read_text()) for end in ends]
    assert cursors[0] == cursors[1], "the same documents in the same order"
    assert not [path for path in (moved / "checkpoints").iterdir() if "universal" in path.name]
    manifests = [json.loads((end / "manifest.json").read_text()) for end in ends]
    assert [(m["world"], m["data"], m["sequence"], m["zero_stage"]) for m in manifests] == [(1, 1, 1, 1), (4, 2, 2, 3)]


def test_another_precision_is_another_layout_and_a_missed_evaluation_is_made_up_for(tmp_path: Path) -> None:
    """A checkpoint of a CPU goes on on a GPU, where bfloat16 is the default."""
    words = ["pipeline", "train", "miras_tiny", *SMALL, "--steps", "2", "--output-dir", str(tmp_path / "run")]
    words += ["--parallel.sequence", "1"]
    done = forked(1, *words, "--zero", "zero1", "--precision", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = read_rows(metrics)
    assert [(row["mode"], row["step"]) for row in rows] == [("val", 0), ("train", 1), ("train", 2), ("val", 2)]
    # As a signal during the last evaluation leaves them.
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    run_file = tmp_path / "run" / "run.json"
    facts = json.loads(run_file.read_text())
    assert facts["evaluated"] == [0, 2]
    run_file.write_text(json.dumps({**facts, "status": "interrupted", "evaluated": [0]}))
    done = forked(1, *words, "--zero", "zero1", "--precision", "bf16", "--resume", "must")
    assert done.returncode == 0, done.stdout + done.stderr
    again = read_rows(metrics)
    assert [(row["mode"], row["step"]) for row in again] == [(row["mode"], row["step"]) for row in rows]
    assert again[-1]["loss"] == pytest.approx(rows[-1]["loss"], rel=2e-2)
    assert f"resumed: from {tmp_path / 'run' / 'checkpoints' / 'checkpoint-2'}" in done.stdout
