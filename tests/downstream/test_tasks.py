"""Tasks by name: their data, and each thing that can be wrong, in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline.downstream.tasks import DEFAULT_TASKS, check_installed, check_path, load_tasks, writes_text
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from tests.downstream.small import CHOSEN, DOCUMENTS, write, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def load(folder: Path, *names: str, generate: bool = True) -> list[str]:
    loaded = load_tasks(names, str(folder), Topology(), "--tasks", generate=generate)
    assert all(len(task.eval_docs) == len(DOCUMENTS) for task in loaded["tasks"].values())
    return list(loaded["tasks"])


def test_tasks_of_a_folder_come_with_their_data(folder: Path) -> None:
    assert load(folder, CHOSEN, "last_word", CHOSEN) == [CHOSEN, "last_word"]


def test_the_harness_has_the_tasks_that_are_the_default() -> None:
    """By its files: the index of its thousands takes long to read."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    places = ("hellaswag", "winogrande", "sciq", "super_glue/copa", "arc", "openbookqa")
    lines = {
        line for place in places for path in (own / place).glob("*.yaml") for line in path.read_text().splitlines()
    }
    assert {f"task: {name}" for name in DEFAULT_TASKS} <= lines


def test_a_name_that_is_none_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    kind = lm_eval.tasks.TaskManager
    # Without the harness's own, whose index takes many seconds.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: kind(
        include_path=include_path, include_defaults=False
    ))  # fmt: skip
    with pytest.raises(UserError, match=r"^--tasks 'three_word': no such task: did you mean three_words"):
        load(folder, CHOSEN, "three_word")
    with pytest.raises(UserError, match=r"^--tasks 'zzzz': no such task: `lm-eval ls tasks` lists them$"):
        load(folder, "zzzz")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "/absent.jsonl"}}}, "absent.jsonl"),
        ({"test_split": "other"}, "other"),
        ({"doc_to_choice": "{{choices"}, "TemplateSyntaxError"),
        ({"doc_to_text": "{{1 / 0}}"}, "ZeroDivisionError"),
        ({"output_type": "guess"}, "guess"),
    ],
    ids=["data", "split", "template", "document", "type"],
)
def test_a_task_that_cannot_be_read_is_named(
    folder: Path, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    import yaml

    task = yaml.safe_load((folder / f"{CHOSEN}.yaml").read_text())
    write(tmp_path, {**task, **changes})
    with pytest.raises(
        UserError, match=rf"^--tasks {CHOSEN}: the task or its data cannot be read \(.*{problem}"
    ) as found:
        load(tmp_path, CHOSEN)
    assert "\n" not in str(found.value)


def test_a_file_that_is_no_yaml_is_named(folder: Path, tmp_path: Path) -> None:
    """Also where another one has the task; tags of the harness are none of it."""
    (tmp_path / "other").mkdir()
    (tmp_path / "a.yaml").write_text("task: a\nprocess_docs: !function utils.process\n")
    (tmp_path / f"{CHOSEN}.yaml").write_text((folder / f"{CHOSEN}.yaml").read_text())
    (tmp_path / "other" / "b.yaml").write_text("task: b\n  x: [\n")
    with pytest.raises(UserError, match=r"^--tasks: \S+/other/b\.yaml is no YAML \(.*line 2.*\): correct it") as found:
        load(tmp_path, CHOSEN)
    assert "\n" not in str(found.value)


def test_training_does_not_generate(folder: Path) -> None:
    assert writes_text(load_tasks(["goes_on"], str(folder), Topology(), "--tasks")) == ["goes_on"]
    with pytest.raises(UserError, match=r"--tasks goes_on: it generates text, which training does not: leave it out"):
        load(folder, "goes_on", generate=False)


def test_the_harness_and_the_folder_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("--tasks")
    check_path(None, "--task-path")
    check_path(str(tmp_path), "--task-path")
    with pytest.raises(UserError, match=r"^--task-path \S+absent: no such folder: give one with tasks"):
        check_path(str(tmp_path / "absent"), "--task-path")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--tasks needs lm-evaluation-harness: pip install -e '\.\[eval\]'$"):
        check_installed("--tasks")
