"""Tasks of a system: in training, and of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipeline.capabilities import Generates, ScoresText
from pipeline.config import RunConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.downstream.system_scorer import SystemScorer
from pipeline.downstream.tasks import Loaded, check_path, load_tasks
from pipeline.lm.decoding import Decoder
from pipeline.parallel.collectives import shared_errors
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation


def evaluate_tasks(
    system: ScoresText,
    model: nn.Module,
    sync_point: SyncPoint,
    loaded: Loaded,
    tokenizer: Tokenizer,
    limit: int | None,
    decoder: Decoder | None = None,
) -> Evaluation:
    """The scores of the tasks, `limit` documents of each. `decoder`: as in `HarnessModel`. Collective."""
    from pipeline.downstream.harness_model import HarnessModel
    from pipeline.downstream.scores import as_evaluation, score_tasks

    scorer = SystemScorer(system, model, sync_point, tokenizer.eos_id)
    return as_evaluation(score_tasks(loaded, HarnessModel(scorer, tokenizer, sync_point, decoder), limit))


def own_decoder(system: object, model: nn.Module) -> Decoder | None:
    """What goes on with texts, of a model that is whole on this process; None where the system has none."""
    if not isinstance(system, Generates):
        return None
    return system.decoder(model.eval())


@dataclass(frozen=True)
class TasksInTraining:
    """The tasks of `--evaluation.tasks`, with their data."""

    loaded: Loaded
    tokenizer: Tokenizer
    limit: int | None

    @classmethod
    def load(cls, config: RunConfig, system: ScoresText, topology: Topology) -> TasksInTraining:
        """Collective; raises UserError, before a step is made in vain."""
        section = config.evaluation
        with shared_errors(topology):
            check_path(section.task_path, "--evaluation.task-path")
        loaded = load_tasks(section.tasks, section.task_path, topology, "--evaluation.tasks", generate=False)
        with shared_errors(topology):
            tokenizer = system.tokenizer()
        return cls(loaded, tokenizer, section.task_limit or None)

    def evaluate(self, system: ScoresText, model: nn.Module, sync_point: SyncPoint) -> Evaluation:
        """As `System.evaluate`."""
        return evaluate_tasks(system, model, sync_point, self.loaded, self.tokenizer, self.limit)
