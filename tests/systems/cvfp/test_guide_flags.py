"""Settings of the guide's config.py that are no field here."""

from __future__ import annotations

import pytest

from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.guide_flags import in_own_flags


def parsed(words: str) -> RunConfig:
    return parse_run(["cvfp_tiny", *words.split()], "train", ranks=1)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--skip-phase2", "--phases fixed_point"),
        ("--skip_phase2=True --seed 3", "--phases fixed_point --seed 3"),
        ("--skip-phase2 false", ""),
        ("--no-skip-phase2 --no-skip-phase1", ""),
        ("--skip-phase1 --init-from somewhere", "--phases prediction --init-from somewhere"),
        ("--load-checkpoint", "--resume auto"),
        ("--load-checkpoint false --seed 2", "--resume never --seed 2"),
        ("--no-load-checkpoint", "--resume never"),
        ("--save-checkpoint", ""),
        ("--save-checkpoint=true --save-every 7 --epochs.save 0", "--save-every 7 --epochs.save 0"),
        ("--gradient-clip 0.5", "--clip 0.5"),
        ("--layernorm-mix 0.5", "--model.layernorm-mix 0.5"),
    ],
)
def test_what_they_mean(words: str, meant: str) -> None:
    assert parsed(words) == parsed(meant)


def test_what_they_set() -> None:
    config = parsed("--gradient-clip 0.5 --layernorm-mix 0.5 --skip-phase2")
    assert isinstance(config.model, CvfpConfig)
    assert (config.clip, config.model.layernorm_mix, config.phases) == (0.5, 0.5, ("fixed_point",))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--skip-phase1", "--init-from CHECKPOINT"),
        ("--skip-phase1 --skip-phase2", "leave nothing to run"),
        ("--skip-phase2 --phases prediction", "--skip-phase2 with --phases, which says the same"),
        ("--skip-phase2=maybe", "--skip-phase2 is 'maybe': give it alone, or true or false"),
        ("--no-save-checkpoint", "--epochs.save 0 --save-every 0"),
        ("--save-checkpoint false", "--epochs.save 0 --save-every 0"),
        ("--load-checkpoint --resume must", "--load-checkpoint with --resume, which says the same"),
        ("--vocab-size 50257", "--vocab-size '50257': the vocabulary is the tokenizer's: give --data.tokenizer"),
        ("--device cuda", "--device 'cuda': a GPU is taken where there is one: set DS_ACCELERATOR=cpu"),
        ("--device=cpu", "DS_ACCELERATOR=cpu before the command"),
        ("--layernorm-mix 0", "--model.layernorm-mix is 0.0: give a share above 0, up to 1"),
    ],
)
def test_what_they_cannot_mean_is_one_line_with_the_flag_to_use(words: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(words)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_other_words_are_left_alone() -> None:
    words = [
        "--phases",
        "prediction",
        "--data.path",
        "a b",
        "--steps=3",
        "-v",
        "--no-report.plots",
        "--device-map",
        "x",
    ]
    assert in_own_flags(words) == words
    with pytest.raises(UserError, match="unknown flag --skip-phase2"):
        parse_run(["miras_tiny", "--skip-phase2"], "train", ranks=1)
