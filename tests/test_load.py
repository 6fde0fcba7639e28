"""What a run does is decided once: the data is listed, then the config is completed by it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline import load
from pipeline.capabilities import CountsEpochs
from pipeline.config import EpochsConfig, RunConfig, replace
from pipeline.errors import UserError
from pipeline.intervals import check_intervals
from pipeline.load import decide, load_model, resolve
from pipeline.parallel.topology import Topology
from tests.toy_systems.phased import phased
from tests.toy_systems.phased.system import PhasedSystem

EXAMPLES = 30


class Counting(PhasedSystem):
    """Lists numbers as its data, which decide a size of the model and how long an epoch is."""

    listed: list[bool] = []

    def list_data(self, *, ask_servers: bool = False) -> Any:
        self.listed.append(ask_servers)
        return range(EXAMPLES)

    def settled(self, topology: Topology) -> RunConfig:
        return replace(self.config, model=dataclasses.replace(self.config.model, threshold=float(len(self.files))))

    def steps_per_epoch(self, topology: Topology) -> float:
        return len(self.files) / (self.config.batch_size * self.config.grad_accum * topology.data)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counting:
    monkeypatch.setattr(load, "create_system", Counting)
    monkeypatch.setattr(Counting, "listed", [])
    return Counting(phased(tmp_path, epochs=EpochsConfig(train=2, evaluate=0.5)))


def test_the_data_is_listed_once_and_completes_the_config(counting: Counting) -> None:
    assert isinstance(counting, CountsEpochs)
    resolved = resolve(counting, Topology())
    system = resolved.system
    assert resolved.config == system.config and system.files == range(EXAMPLES)
    # Four rows a step: 2 x 30 / 4 steps, and an evaluation every 3.75, rounded.
    assert (resolved.config.steps, resolved.config.eval_every) == (15, 4)
    assert resolved.config.model.threshold == EXAMPLES  # type: ignore[attr-defined]
    loaded = load_model(resolved.config, system, Topology(), ds_config=resolved.ds_config)
    assert loaded.phases[0].steps == 15 and Counting.listed == [True]


def test_an_evaluation_lists_by_itself_and_asks_no_server(counting: Counting) -> None:
    load_model(counting.config, counting, Topology())
    assert counting.files == range(EXAMPLES) and Counting.listed == [False]


def test_what_one_process_decides_for_all_is_listed_by_it(counting: Counting) -> None:
    counting.files = counting.list_data()
    topology = Topology(world=2)
    config = decide(counting, topology).config
    assert (config.steps, config.eval_every) == (8, 2) and Counting.listed == [False]
    # What a run archives, it runs again.
    again = Counting(config)
    again.files = counting.files
    assert decide(again, topology).config == config


def test_a_system_that_counts_no_epochs_refuses_them(tmp_path: Path) -> None:
    for flag, lengths in (
        ("--epochs 1.5", {"train": 1.5}), ("--epochs.save 1", {"save": 1.0}), ("--epochs.sample 2", {"sample": 2.0})
    ):  # fmt: skip
        config = phased(tmp_path, epochs=EpochsConfig(**lengths))
        check_intervals(config, Counting(config))
        with pytest.raises(UserError, match=f"{flag}: phased_tiny counts no epochs: leave it out"):
            check_intervals(config, PhasedSystem(config))
