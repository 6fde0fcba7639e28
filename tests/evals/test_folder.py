"""`eval FOLDER --suite downstream`: of a model without a run, the scores of its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.commands.command_help import HELP
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.evals.command import run_eval
from pipeline.evals.folder import is_model_folder
from pipeline.host.local import LocalHost
from tests.checkpoint.test_olmo_native import native
from tests.downstream.small import CHOSEN, write_tasks
from tests.inference import checkpoints


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return ["--suite", "downstream", "--tasks", f"{CHOSEN},last_word,goes_on", "--task-path", str(folder)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank: `eval` joins a group of one, and leaves it."""
    port = LocalHost(os.environ).free_port()
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


def saved(folder: Path, config: RunConfig) -> tuple[Any, Any]:
    """A checkpoint, with the file that says where its run stood."""
    found = checkpoints.checkpoint(folder, config)
    (folder / "trainer_state.json").write_text("{}")
    return found


def scores(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((path / "downstream" / "evaluation.json").read_text())["downstream"]
    return found


def by_the_harness(folder: Path, tasks: Path, names: list[str]) -> Any:
    """The results of the harness's own class and task loader on a folder."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=tasks, include_defaults=False).load(names)
    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    return evaluate(model, loaded, bootstrap_iters=0, log_samples=False)["results"]


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_and_its_exported_folder_have_the_same_scores(
    tmp_path: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.data.tokenizer import ByteTokenizer
    from pipeline.export.tokenizer_files import write_tokenizer

    config = checkpoints.olmo()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    system, model = saved(checkpoint, config)
    folder = tmp_path / "exported"
    system.exported(model).save_pretrained(folder)
    write_tokenizer(ByteTokenizer(), folder, config.sequence_length)
    assert is_model_folder(folder) and not is_model_folder(checkpoint)
    # The data that it was trained on is not here.
    run_eval([str(checkpoint), *tasks, "--data.path", str(tmp_path / "gone.txt")])
    run_eval([str(folder), *tasks])
    table = capsys.readouterr().out
    assert f"written to {tmp_path / 'run/evals/checkpoint-5/downstream'}\n" in table
    assert f"written to {tmp_path / 'evals/exported/downstream'}\n" in table
    first, second = scores(tmp_path / "run/evals/checkpoint-5"), scores(tmp_path / "evals/exported")
    assert [score["task"] for score in first] == [CHOSEN, CHOSEN, "last_word", "last_word", "goes_on"]
    for one, other in zip(first, second, strict=True):
        assert other["value"] == pytest.approx(one["value"], rel=1e-4)
        assert {**one, "value": 0, "stderr": 0} == {**other, "value": 0, "stderr": 0}
        row = next(line.split() for line in table.splitlines() if line.startswith(f"{one['task']} "))
        assert row[-1] == one["prompt_hash"]
    harness = by_the_harness(folder, Path(tasks[-1]), [CHOSEN, "last_word", "goes_on"])
    for score in first:
        assert harness[score["task"]][f"{score['metric']},none"] == pytest.approx(score["value"], rel=1e-4)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_with_memory_is_scored_and_generates(tmp_path: Path, tasks: list[str]) -> None:
    saved(tmp_path / "checkpoint-5", checkpoints.miras())
    run_eval([str(tmp_path / "checkpoint-5"), *tasks, "--limit", "3"])
    found = scores(tmp_path / "evals" / "checkpoint-5")
    assert [score["n"] for score in found] == [3] * 5
    content = json.loads((tmp_path / "evals/checkpoint-5/downstream/evaluation.json").read_text())
    assert content["command"] == ["mnemos", "eval", str(tmp_path / "checkpoint-5"), *tasks, "--limit", "3"]


def test_a_folder_of_olmos_layout_is_scored(tmp_path: Path, tasks: list[str]) -> None:
    run_eval([str(native(tmp_path / "step7-unsharded")), *tasks, "--limit=2", "--data.tokenizer", "bytes"])
    content = json.loads((tmp_path / "evals/step7-unsharded/downstream/evaluation.json").read_text())
    assert content["folder"] == "step7-unsharded" and content["downstream"][0]["n"] == 2
    assert content["scalars"][f"downstream/{CHOSEN}/n"] == 2
    words = [str(tmp_path / "step7-unsharded"), *tasks, "--limit=2", "--data.tokenizer", "bytes"]
    assert content["command"] == ["mnemos", "eval", *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "is no checkpoint of a run, whose data is held out: give --suite downstream"),
        (["--suite", "recall"], "is no checkpoint of a run, whose data is held out: give --suite downstream"),
        (["--suite", "downstream", "--steps", "3"], "--steps: .* is no checkpoint of a recipe, whose flags these are"),
    ],
)
def test_what_a_folder_does_not_take(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_eval([str(native(tmp_path / "step7-unsharded")), *words])
    assert not (tmp_path / "evals").exists()


def test_the_usage_is_printed_of_a_folder_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_eval([str(native(tmp_path / "step7-unsharded")), "--help"])
    assert capsys.readouterr().out == HELP["eval"] + "\n"


def test_a_folder_is_evaluated_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is evaluated by one process: start it without a launcher"):
        run_eval([str(native(tmp_path / "step7-unsharded")), "--suite", "downstream"])


def test_an_unknown_task_is_refused_before_the_model_is_read(
    tmp_path: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = native(tmp_path / "step7-unsharded")
    (folder / "model.pt").write_bytes(b"no model")
    broken = yaml.safe_dump(
        {"task": "broken", "dataset_path": str(tmp_path / "absent"), "output_type": "loglikelihood"}
    )
    (Path(tasks[-1]) / "broken.yaml").write_text(broken)
    with pytest.raises(UserError, match=r"^--tasks broken: the task or its data cannot be read"):
        run_eval([str(folder), "--suite", "downstream", "--tasks", "broken", *tasks[-2:]])
