"""Scores of a model on tasks, each with what makes it comparable: split, n, standard error, chance and prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.downstream.harness_model import HarnessModel
from pipeline.downstream.quiet import SEEDS, harness
from pipeline.downstream.tasks import Loaded
from pipeline.evaluation_result import CHANCE, COUNT, STDERR, TASKS, Evaluation, has_chance

RESAMPLES = 1000
"""Of the bootstrap, for standard errors of metrics that are no means."""
NAME = "downstream"
"""Of the table of scores."""


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """With the harness's filter of the answers behind a slash, where there is one."""
    value: float
    stderr: float | None
    """Standard error of the value over documents; None where the metric has none, or there is one document."""
    n: int
    """Documents that were scored."""
    split: str
    """Of the data set; several are joined by commas, of a group of tasks."""
    chance: float | None
    """Expected value of answers drawn evenly; None where the answers are no choices."""
    shots: int
    """Examples in the prompt."""
    version: str
    """Of the task."""
    truncated: int
    """Requests whose first tokens the model did not read."""
    prompt_hash: str
    """Of all requests of the task as the model gets them, in order: equal scores of equal models need equal hashes."""

    @property
    def name(self) -> str:
        """That of its scalar."""
        return f"{TASKS}{self.task}/{self.metric}"


@dataclass(frozen=True)
class _Facts:
    """What all scores of a task share."""

    n: int
    split: str
    chance: float | None
    truncated: int
    prompt_hash: str


def score_tasks(loaded: Loaded, model: HarnessModel, limit: int | None = None) -> list[Score]:
    """The scores of all tasks, then those of groups that have any. `limit`: documents of each task, the first ones;
    None: all. The same on every rank. Collective."""
    from lm_eval.evaluator import evaluate

    tasks: Mapping[str, Any] = loaded["tasks"]
    with harness():
        for task in tasks.values():
            # Examples of prompts are drawn: as in the first evaluation.
            task.set_fewshot_seed(seed=SEEDS["few-shot"])
        model.truncated.clear()
        found: Any = evaluate(model, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
        facts = {
            name: _Facts(
                found["results"][name]["sample_len"], _split(task), _chance(task), model.truncated[name], _hash(task)
            )
            for name, task in tasks.items()
        }
        for task in tasks.values():
            # Each request holds its document.
            task._instances = None
    for name, group in loaded["groups"].items():
        facts[name] = _of_group([facts[task.task_name] for task in group.get_all_tasks()])
    return [score for name in facts for score in _scores(name, facts[name], found)]


def _scores(name: str, facts: _Facts, found: Any) -> Iterable[Score]:
    metrics: Mapping[str, Any] = found["results"][name]
    shots = found["n-shot"].get(name)
    for key, value in metrics.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith(STDERR):
            continue
        stderr = metrics.get(f"{metric}{STDERR},{kept}")
        chance = facts.chance if has_chance(metric) else None
        yield Score(
            task=name,
            metric=metric if kept == "none" else f"{metric}/{kept}",
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            shots=int(shots or 0),
            version=str(found["versions"].get(name, "")),
            **{**dataclasses.asdict(facts), "chance": chance},
        )


def _of_group(parts: Sequence[_Facts]) -> _Facts:
    n = sum(part.n for part in parts)
    known = [part.chance * part.n for part in parts if part.chance is not None]
    digest = hashlib.sha256("".join(part.prompt_hash for part in parts).encode())
    return _Facts(
        n,
        ",".join(sorted({part.split for part in parts})),
        sum(known) / n if n and len(known) == len(parts) else None,
        sum(part.truncated for part in parts),
        digest.hexdigest()[:16],
    )


def _split(task: Any) -> str:
    """The split whose documents the harness asks about."""
    kind = "test" if task.has_test_docs() else "validation"
    return str(task.get_config(f"{kind}_split") or kind)


def _chance(task: Any) -> float | None:
    """The mean over documents of right choices by choices."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.get_config("process_results")):
        return None
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    right = [len(set(task.doc_to_target(doc))) if task.multiple_target else 1 for doc in documents.values()]
    choices = [len(task.doc_to_choice(doc)) for doc in documents.values()]
    return sum(hit / count for hit, count in zip(right, choices, strict=True)) / len(documents)


def _hash(task: Any) -> str:
    """SHA-256 of the requests, its first 16 hex digits."""
    requests = [[instance.request_type, *instance.args] for instance in task.instances]
    return hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()[:16]


def as_evaluation(scores: Sequence[Score]) -> Evaluation:
    """Scalars `downstream/TASK/METRIC`, with `_stderr` where there is one, `downstream/TASK/n` and `chance`; and a
    table of all that is known."""
    scalars: dict[str, float] = {}
    for score in scores:
        scalars[score.name] = score.value
        if score.stderr is not None:
            scalars[f"{score.name}{STDERR}"] = score.stderr
        if score.chance is not None:
            scalars[f"{TASKS}{score.task}{CHANCE}"] = score.chance
        scalars[f"{TASKS}{score.task}{COUNT}"] = score.n
    return Evaluation(scalars, tables={NAME: [dataclasses.asdict(score) for score in scores]})
