"""The tasks by name, with their data, as lm-evaluation-harness has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, brief, shown
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.spelling import did_you_mean, nearest

DEFAULT_TASKS = ("hellaswag", "winogrande", "sciq", "copa", "arc_easy", "openbookqa")
"""Those whose scores are quoted of models of about a billion parameters."""
GENERATES = "generate_until"
"""Type of the requests of tasks that go on with a text."""

Loaded = dict[str, Any]
"""What the harness's `TaskManager.load` gives: `tasks` and `groups` by name."""


def check_installed(flag: str) -> None:
    """Raises UserError, which begins with `flag`, where the harness is not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{flag} needs lm-evaluation-harness: pip install -e '.[eval]'")


def check_path(path: str | None, flag: str) -> None:
    """Raises UserError, which begins with `flag`, unless it is a folder, or none."""
    if path is not None and not Path(path).is_dir():
        raise UserError(f"{flag} {path}: no such folder: give one with tasks in the harness's YAML form")


def load_tasks(
    names: Sequence[str], path: str | None, topology: Topology, flag: str, *, generate: bool = True
) -> Loaded:
    """The tasks and their data, which are downloaded once a node where they are not in the cache. `flag`: what named
    them, for messages. `generate`: whether tasks that generate text can be run. Collective; raises UserError for a
    name that is none, for data that cannot be read, and for a task without documents."""
    found: Loaded | None = None
    # The first rank of a node fills the cache that the others read.
    for turn in (topology.local_rank == 0, topology.local_rank != 0):
        with shared_errors(topology):
            if turn:
                found = _load(names, path, flag, generate)
    assert found is not None
    return found


def _load(names: Sequence[str], path: str | None, flag: str, generate: bool) -> Loaded:
    check_installed(flag)
    from pipeline.downstream.quiet import SEEDS, harness

    with harness():
        manager = _manager(names, path, flag)
        loaded: Loaded = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in dict.fromkeys(names):
            try:
                part = manager.load([name])
                for task in part["tasks"].values():
                    if task.get_config("num_fewshot") is None:
                        task.set_config(key="num_fewshot", value=0)
                    task.set_fewshot_seed(seed=SEEDS["few-shot"])
                    # The first document shows whether the data and the templates are what the task says.
                    task.build_all_requests(limit=1)
            except Exception as error:  # data sets, templates and code of tasks raise whatever they meet
                raise UserError(
                    f"{flag} {name}: the task or its data cannot be read ({type(error).__name__}: {brief(error)}):"
                    " correct it; a data set of the Hub needs the network, or must be in the local cache"
                ) from error
            for kind, others in part.items():
                loaded[kind].update(others)
    writes = writes_text(loaded)
    if writes and not generate:
        raise UserError(
            f"{flag} {writes[0]}: it generates text, which training does not: leave it out, and evaluate a checkpoint"
            " with eval --suite downstream"
        )
    return loaded


def writes_text(loaded: Loaded) -> list[str]:
    """The names of the tasks that go on with a text."""
    return [name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == GENERATES]


def _manager(names: Sequence[str], path: str | None, flag: str) -> Any:
    """What knows all the names. Raises UserError for one that is unknown."""
    from lm_eval.tasks import TaskManager

    if path is not None:
        _check_yaml(Path(path), flag)
    # The index of the harness's own thousands of tasks takes many seconds.
    manager = None if path is None else _index(TaskManager, path, flag, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = _index(TaskManager, path, flag, include_defaults=True)
    for name in names:
        if name not in manager.all_tasks:
            meant = did_you_mean(nearest(name, manager.all_tasks))
            raise UserError(f"{flag} {shown(name)}: no such task{meant or ': `lm-eval ls tasks` lists them'}")
    return manager


def _check_yaml(folder: Path, flag: str) -> None:
    """Raises UserError for a file that is no YAML: the harness leaves it out, and a group then lacks a task."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.rglob("*.yaml")):
        try:
            # Tags are for the harness to read.
            for _ in yaml.parse(path.read_bytes(), Loader=loader):
                pass
        except yaml.YAMLError as error:
            raise UserError(f"{flag}: {path} is no YAML ({brief(error)}): correct it, or move it away") from error


def _index(kind: Any, path: str | None, flag: str, *, include_defaults: bool) -> Any:
    try:
        return kind(include_path=path, include_defaults=include_defaults)
    except Exception as error:  # a YAML file that is none raises whatever it meets
        raise UserError(f"{flag}: the tasks in {path} cannot be read ({brief(error)}): correct them") from error
