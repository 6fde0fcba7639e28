"""A misspelt word is answered with the one that was meant, a plain flag before those of sections."""

from __future__ import annotations

import itertools

import pytest

from pipeline.commands.flag_help import flag_names
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_recall, miras_tiny
from pipeline.spelling import MOST, did_you_mean, nearest, nearest_flag

FLAGS = flag_names(miras_tiny())
PLAIN = sorted({flag for flag in FLAGS if "." not in flag})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--step", "--steps"),
        ("--stepz", "--steps"),
        ("--sequnce-length", "--sequence-length"),
        ("--sequence", "--sequence-length"),
        ("--batchsize", "--batch-size"),
        ("--output_dirs", "--output-dir"),
        ("--max-seq-lenght", "--max-seq-length"),
        ("--warmup", "--warmup-steps"),
        ("--rule", "--model.memory.rule"),
        ("--tokeniser", "--tokenizer"),
        ("--data.pth", "--data.path"),
        ("--memory.rule", "--model.memory.rule"),
        ("-steps", "--steps"),
        ("--no-plot", "--no-plots"),
        ("--report.no-plot", "--report.no-plots"),
    ],
)
def test_a_misspelt_flag_is_found(typed: str, meant: str) -> None:
    assert nearest_flag(typed, FLAGS)[0] == meant


def test_a_plain_flag_is_meant_alone_where_no_section_has_that_very_name() -> None:
    assert nearest_flag("--step", FLAGS) == nearest_flag("-steps", FLAGS) == ["--steps"]


def test_flags_that_are_one_letter_away_are_all_meant() -> None:
    assert set(nearest_flag("--xval-interval", FLAGS)) == {"--val-interval", "--eval-interval"}


def test_a_name_that_several_sections_have_names_them_all() -> None:
    assert set(nearest_flag("--layers", FLAGS)) == {"--model.backbone.layers", "--model.memory.layers"}


@pytest.mark.parametrize("typed", ["--galaxy", "--zzz", "--"])
def test_nothing_near_is_no_suggestion(typed: str) -> None:
    assert nearest_flag(typed, FLAGS) == []


def test_one_letter_less_or_other_of_a_long_plain_flag_still_means_it() -> None:
    """Every flag, every place: a sample of them passed for weeks beside one that failed."""
    missed = []
    for flag in (flag for flag in PLAIN if len(flag) > 9):
        for place, letter in itertools.product(range(2, len(flag)), ("", "x")):
            typed = flag[:place] + letter + flag[place + 1 :]
            if typed not in FLAGS and flag not in nearest_flag(typed, FLAGS):
                missed.append((flag, typed))
    assert missed == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mirastiny", "miras_tiny"), ("miras-recall", "miras_recall"), ("miras_65k", "miras_64k"), ("tiny", None)],
)
def test_a_misspelt_recipe_is_found(typed: str, meant: str | None) -> None:
    assert [meant][: meant is not None] == nearest(typed, all_recipes(), most=1)


def test_the_start_of_a_word_means_what_goes_on_from_it() -> None:
    found = nearest("mira", all_recipes())
    assert len(found) == MOST and all(name.startswith("miras") for name in found)
    assert nearest("mi", ["missing"]) == []


def test_the_words_of_a_suggestion() -> None:
    assert did_you_mean([]) == ""
    assert did_you_mean(["a"]) == ": did you mean a?"
    assert did_you_mean(["a", "b", "c"]) == ": did you mean a, b or c?"


def test_the_names_of_flags_are_those_that_are_taken() -> None:
    names = set(flag_names(miras_recall()))
    assert {
        "--steps",
        "--max-steps",
        "--bs",
        "--report.no-plots",
        "--no-plots",
        "--no-dry-run",
        "--data.recall.pairs",
    } <= names
    assert {"--model.recall.pairs", "--data.recall.pairs"} <= names
    assert not {"--recipe", "--model.system", "--model.recall", "--data.recall"} & names
