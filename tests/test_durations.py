"""Lengths in epochs: the steps that they are, and which of two measures counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.flags import parse_run
from pipeline.config import EpochsConfig, RunConfig, replace
from pipeline.durations import by_one_measure, in_epochs
from pipeline.errors import UserError
from pipeline.model_config import ModelConfig

PLAIN = RunConfig("none", ModelConfig(), steps=7, batch_size=1, sequence_length=8, lr=0.1, save_every=5, eval_every=0)


def with_epochs(**lengths: float) -> RunConfig:
    return replace(PLAIN, epochs=EpochsConfig(**lengths))


@given(tenths=st.integers(1, 500), every=st.integers(1, 500), rows=st.integers(1, 64), examples=st.integers(1, 10_000))
def test_epochs_are_the_least_steps_that_read_them_and_intervals_the_nearest(
    tenths: int, every: int, rows: int, examples: int
) -> None:
    config = in_epochs(with_epochs(train=tenths / 10, evaluate=every / 10), examples / rows)
    # In whole numbers: the steps read so many tenths of an epoch, and one step less does not.
    assert config.steps * rows * 10 >= tenths * examples > (config.steps - 1) * rows * 10
    assert config.eval_every >= 1
    assert config.eval_every == 1 or abs(config.eval_every * rows * 10 - every * examples) <= rows * 5
    assert (config.save_every, config.sample_every) == (5, 0), "what is given in steps stays"
    assert in_epochs(config, examples / rows) == config, "a settled config is settled again"


def test_a_product_that_is_rounded_up_is_no_step_more() -> None:
    assert 2.2 * 25 > 55
    assert in_epochs(with_epochs(train=2.2), 25).steps == 55
    assert in_epochs(with_epochs(sample=0.001), 30).sample_every == 1
    assert in_epochs(PLAIN, 30) == PLAIN


def test_more_steps_than_a_run_can_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"--epochs.train is 1e\+09, 1e\+11 steps: give fewer"):
        in_epochs(with_epochs(train=1e9), 100)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["train", "save", "evaluate", "sample"])
def test_a_length_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--epochs.{name} is {value}: give 0 or more"):
        with_epochs(**{name: value})


def test_steps_that_a_person_gives_stand_over_epochs_that_were_there() -> None:
    config = with_epochs(train=3, save=1, evaluate=2, sample=4)
    assert by_one_measure(config, {"epochs.train"}, set()) == config
    assert by_one_measure(config, {"steps"}, set()).epochs == EpochsConfig(0, 1, 2, 4)
    assert by_one_measure(config, {"max_duration", "sample_every"}, set()).epochs == EpochsConfig(0, 1, 2, 0)
    # A file that gives steps alone means them; one that a run archived gives both, and epochs decide.
    assert by_one_measure(config, set(), {"save_every"}).epochs == EpochsConfig(3, 0, 2, 4)
    assert by_one_measure(config, set(), {"save_every", "epochs.save"}) == config
    none = with_epochs(save=1)
    assert by_one_measure(none, {"epochs.train", "steps"}, set()) == none, "--epochs 0 --steps 5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "3", "--max-steps", "4"], "--epochs and --steps are both given, and each says the same length"),
        (["--epochs.train", "3", "--max-duration", "4"], "--epochs and --max-duration are both given"),
        (["--epochs.save", "3", "--save-interval", "4"], "--epochs.save and --save-every are both given"),
        (["--epochs.evaluate", "3", "--eval-every", "4"], "--epochs.evaluate and --eval-every are both given"),
    ],
)
def test_both_measures_are_refused_by_their_flags(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_run(["miras_tiny", *words], "train", ranks=1)


def test_a_file_of_a_run_in_epochs_is_run_in_steps_where_they_are_given(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("recipe: miras_tiny\nsteps: 12\nepochs:\n  train: 2.5\n  save: 1.0\n")
    found = parse_run(["--config", str(file)], "train", ranks=1)
    assert (found.steps, found.epochs) == (12, EpochsConfig(train=2.5, save=1.0))
    found = parse_run(["--config", str(file), "--steps", "9"], "train", ranks=1)
    assert (found.steps, found.epochs) == (9, EpochsConfig(save=1.0))
