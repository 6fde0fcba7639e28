"""What a run has to have in common with its control."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.trainable import TRAINABLE
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.recipes.mimir import mimir_tiny
from pipeline.run import Progress
from pipeline.system import create_system
from pipeline.systems.cvfp.data.build import build_loader, list_documents
from pipeline.systems.cvfp.evaluation.alike import check_alike
from pipeline.systems.cvfp.system import CvfpSystem
from tests.checkpoint.whole import write_whole
from tests.systems.cvfp.harness import documents, small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alike")
    documents(folder / "documents")
    return folder


def control(folder: Path, **changes: Any) -> RunConfig:
    return small(folder, prediction__context="zero", **changes)


def saved(
    path: Path, config: RunConfig, *, ranks: int = 1, phase: str = "prediction", done: bool = True, weights: str = ""
) -> Path:
    """A checkpoint of a run of this config on so many data ranks, as far as a comparison reads it."""
    path.mkdir(parents=True)
    state = dataclasses.asdict(Progress(step=1, phase=phase, phase_done=done))
    (path / "trainer_state.json").write_text(json.dumps(state))
    (path / TRAINABLE).write_text(weights or str(path))
    loader = build_loader(config, Topology(world=ranks), list_documents(config))
    rows = config.batch_size * config.grad_accum * ranks
    write_whole(path, {"step": 1, "global_batch": rows, "data_fingerprint": loader.state_dict()["fingerprint"]})
    return path


def refused(folder: Path, own: Path, other: RunConfig, path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        check_alike(small(folder, **changes), own, other, path)
    text = str(error.value)
    assert text.startswith(f"--control {path}: ") and "\n" not in text
    return text.removeprefix(f"--control {path}: ")


def test_another_split_of_the_same_rows_is_alike(folder: Path, tmp_path: Path) -> None:
    own = saved(tmp_path / "own", small(folder))
    splits: tuple[tuple[dict[str, Any], int], ...] = (
        ({}, 1),
        ({"batch_size": 2, "grad_accum": 4}, 1),
        ({"batch_size": 2, "grad_accum": 2}, 2),
        ({"batch_size": 4, "global_batch_size": 8}, 2),
        # What is written otherwise, and means the same.
        ({"phases": ("fixed_point", "prediction")}, 1),
        ({"data__path": (str(folder / "documents" / ".." / "documents"),)}, 1),
        ({"evaluation__batch_size": 3, "report__log_every": 7, "model__data_cache": str(tmp_path / "cache")}, 1),
    )
    for number, (changes, ranks) in enumerate(splits):
        other = control(folder, **changes)
        check_alike(small(folder), own, other, saved(tmp_path / f"other{number}", other, ranks=ranks))


def test_other_rows_of_an_update_are_refused(folder: Path, tmp_path: Path) -> None:
    own, other = saved(tmp_path / "own", small(folder)), control(folder, batch_size=8)
    text = refused(folder, own, other, saved(tmp_path / "other", other, ranks=2))
    assert text == (
        "has rows of an update (--batch-size x --grad-accum x data ranks) 16, where this run has 8: give a run that was"
        " trained alike but for --model.prediction.context zero"
    )


def test_other_text_of_the_same_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    """A file that has changed, under the same name."""
    documents(tmp_path / "documents")
    settings = {"data__path": (str(tmp_path / "documents"),), "model__data_cache": str(tmp_path / "cache")}
    own = saved(tmp_path / "own", small(folder, **settings))
    check_alike(small(folder), own, control(folder), saved(tmp_path / "same", control(folder)))
    first = tmp_path / "documents" / "00.txt"
    first.write_text(first.read_text().swapcase())
    other = control(folder, **settings)
    text = refused(folder, own, other, saved(tmp_path / "other", other), **settings)
    assert text.startswith("has other documents: 'documents_allsamples_12len, ") and "where this run has" in text
    # Others are held out.
    other = control(folder, data__holdout=0.4)
    assert "has other documents" in refused(folder, own, other, saved(tmp_path / "fewer", other))


def test_an_order_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    own, other = saved(tmp_path / "own", small(folder)), control(folder, data__shuffle=False)
    text = refused(folder, own, other, saved(tmp_path / "other", other))
    assert text.startswith("has --data.shuffle False, where this run has True")


def test_the_same_weights_are_alike_however_they_are_named(folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first" / "checkpoints"
    trained = saved(first / "checkpoint-3", small(folder), phase="fixed_point", weights="first")
    (first / "latest").write_text("checkpoint-3\n")
    copy = saved(tmp_path / "copy", small(folder), phase="fixed_point", weights="first")
    (tmp_path / "link").symlink_to(trained)
    second: dict[str, Any] = {"phases": ("prediction",), "init_from": first / "latest"}
    own, path = saved(tmp_path / "own", small(folder, **second)), saved(tmp_path / "other", control(folder))
    for place in (first / "latest", trained, first / ".." / "checkpoints" / "latest", copy, tmp_path / "link"):
        check_alike(small(folder, **second), own, control(folder, **(second | {"init_from": place})), path)
    others = saved(tmp_path / "others", small(folder), phase="fixed_point", weights="others")
    for place in (others, tmp_path / "absent"):
        other = control(folder, **(second | {"init_from": place}))
        text = refused(folder, own, other, path, **second)
        assert text.startswith(f"has --init-from '{str(place)[:3]}") and "latest'" in text
    text = refused(folder, own, control(folder, phases=("prediction",)), path, **second)
    assert text.startswith("has --init-from None, where this run has ")
    assert "has --phases 'fixed_point prediction', where this run has 'prediction'" in refused(
        folder, own, control(folder), path, **second
    )


def test_a_control_may_begin_where_the_first_phase_of_the_run_ended(folder: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    ended = saved(checkpoints / "checkpoint-3", small(folder), phase="fixed_point")
    before = saved(checkpoints / "checkpoint-2", small(folder), phase="fixed_point", done=False)
    own = saved(checkpoints / "checkpoint-9", small(folder))
    path = saved(tmp_path / "other", control(folder))
    check_alike(small(folder), own, control(folder, phases=("prediction",), init_from=ended), path)
    elsewhere = saved(tmp_path / "elsewhere" / "checkpoints" / "checkpoint-3", small(folder), phase="fixed_point")
    for place in (before, elsewhere, own):
        other = control(folder, phases=("prediction",), init_from=place)
        assert refused(folder, own, other, path).startswith(
            "has --phases 'prediction', where this run has 'fixed_point"
        )


def test_what_is_no_control_is_named(folder: Path, tmp_path: Path) -> None:
    own, path = saved(tmp_path / "own", small(folder)), saved(tmp_path / "other", control(folder))
    config = control(folder)
    for other, message in (
        (mimir_tiny(), "is a run of mimir_tiny: give one of cvfp_tiny"),
        (small(folder), "was trained with its contexts: give a run with --model.prediction.context zero"),
        (dataclasses.replace(config, lr=0.5), "has --lr 0.5, where"),
        (dataclasses.replace(config, seed=7), "has --seed 7, where this run has 0"),
        (
            dataclasses.replace(config, sequence_length=13),
            "has --sequence-length 13, where this run has 12: give a run",
        ),
        (control(folder, epochs__train=3.0), "has --epochs.train 3.0, where"),
        (control(folder, model__width=16), "has --model.width 16, where this run has 8"),
        (control(folder, fixed_point__momentum=0.5), "has --model.fixed-point.momentum 0.5, where"),
        (control(folder, optimizer__eps=1e-3), "has --optimizer.eps 0.001, where"),
    ):
        assert refused(folder, own, other, path).startswith(message)
    early = saved(tmp_path / "early", small(folder), phase="fixed_point")
    assert refused(folder, own, config, early).startswith("it is of phase fixed_point, which predicts no token")
    assert refused(folder, early, config, path).startswith("this checkpoint is of phase fixed_point")


def test_the_system_asks_it(folder: Path, tmp_path: Path) -> None:
    system = create_system(small(folder))
    assert isinstance(system, CvfpSystem)
    own, path = saved(tmp_path / "own", small(folder)), saved(tmp_path / "other", control(folder))
    system.check_control(own, control(folder), path)
    with pytest.raises(UserError, match="was trained with its contexts"):
        system.check_control(own, small(folder), path)
