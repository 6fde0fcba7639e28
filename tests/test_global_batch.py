"""Micro-batches follow from the global batch and the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.flags import parse_run
from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.global_batch import in_global_batches
from pipeline.recipes.olmo import olmo_1b

SIZES = st.integers(1, 300)


@pytest.mark.parametrize("ranks, accumulation", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_guides_batch_is_the_same_on_one_rank_and_on_eight(ranks: int, accumulation: int) -> None:
    config = parse_run(["olmo_1b"], "train", ranks=ranks)
    assert (config.batch_size, config.grad_accum, config.global_batch_size) == (8, accumulation, 64)


def test_ranks_that_share_a_sequence_are_one_data_rank() -> None:
    assert parse_run(["olmo_1b", "--parallel.sequence", "2"], "train", ranks=8).grad_accum == 2


def test_an_accumulation_that_is_given_stands_over_the_recipes_global_batch() -> None:
    config = parse_run(["olmo_1b", "--grad-accum", "3"], "train", ranks=1)
    assert (config.grad_accum, config.global_batch_size) == (3, None)


def test_two_that_disagree_are_refused() -> None:
    words = ["olmo_1b", "--global-batch-size", "64", "--grad-accum"]
    assert parse_run([*words, "8"], "train", ranks=1).grad_accum == 8
    with pytest.raises(UserError, match=r"takes 8 micro-batches of --batch-size 8 .*--grad-accum is 3: leave one out"):
        parse_run([*words, "3"], "train", ranks=1)


def test_a_run_of_a_saved_config_has_its_global_batch_on_other_ranks(tmp_path: Path) -> None:
    from pipeline.config_file import save_config

    save_config(parse_run(["olmo_1b"], "train", ranks=1), tmp_path / "config.yaml")
    assert parse_run(["--config", str(tmp_path / "config.yaml")], "train", ranks=4).grad_accum == 2
    (tmp_path / "own.yaml").write_text("recipe: olmo_1b\ngrad_accum: 5\n")
    assert parse_run(["--config", str(tmp_path / "own.yaml")], "train", ranks=4).grad_accum == 5


def test_a_batch_in_tokens_is_one_of_sequences() -> None:
    config = parse_run(["olmo_1b", "--global-batch-tokens", "131072"], "train", ranks=2)
    assert (config.global_batch_size, config.grad_accum) == (64, 4)
    halved = ["olmo_1b", "--global-batch-tokens", "131072", "--sequence-length", "1024"]
    assert parse_run(halved, "train", ranks=2).global_batch_size == 128
    same = ["olmo_1b", "--global-batch-tokens", "131072", "--global-batch-size", "64"]
    assert parse_run(same, "train", ranks=1).grad_accum == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global-batch-tokens", "131073"], "no multiple of --sequence-length 2048: give 131072"),
        (["--global-batch-tokens", "5"], "give 2048"),
        (["--global-batch-tokens", "0"], "--global-batch-tokens is 0: give a value above 0"),
        (["--global-batch-tokens", "131072", "--global-batch-size", "32"], "are 64 sequences .* is 32: leave one out"),
        (["--global-batch-tokens", "131072", "--grad-accum", "3"], "--grad-accum is 3: leave one out"),
    ],
)
def test_a_batch_in_tokens_that_does_not_fit_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_run(["olmo_1b", *flags], "train", ranks=1)


def test_flags_stand_over_the_tokens_of_a_saved_config(tmp_path: Path) -> None:
    from pipeline.config_file import save_config

    path = tmp_path / "config.yaml"
    save_config(parse_run(["olmo_1b", "--global-batch-tokens", "131072"], "train", ranks=1), path)
    again = parse_run(["--config", str(path)], "train", ranks=4)
    assert (again.global_batch_tokens, again.global_batch_size, again.grad_accum) == (131072, 64, 2)
    sizes = parse_run(["--config", str(path), "--global-batch-size", "32"], "train", ranks=1)
    assert (sizes.global_batch_tokens, sizes.global_batch_size, sizes.grad_accum) == (None, 32, 4)
    accumulated = parse_run(["--config", str(path), "--grad-accum", "3"], "train", ranks=1)
    assert (accumulated.global_batch_tokens, accumulated.global_batch_size, accumulated.grad_accum) == (None, None, 3)


@given(SIZES, SIZES, SIZES)
def test_the_product_is_the_global_batch_or_the_fix_makes_it_so(whole: int, rows: int, ranks: int) -> None:
    config = replace(olmo_1b(), global_batch_size=whole, batch_size=rows)
    try:
        found = in_global_batches(config, (), ranks)
    except UserError as error:
        flag, value = str(error).partition(": give ")[2].partition(",")[0].split()
        field = {"--batch-size": "batch_size", "--global-batch-size": "global_batch_size"}[flag]
        config = replace(config, **{field: int(value)})
        if field == "global_batch_size":
            assert config.global_batch_size is not None and config.global_batch_size % ranks == 0
            return
        found = in_global_batches(config, (), ranks)
    assert found.grad_accum * found.batch_size * ranks == found.global_batch_size


def test_without_one_nothing_changes() -> None:
    config = replace(olmo_1b(), global_batch_size=None, grad_accum=5)
    assert in_global_batches(config, (), 3) == config


def test_a_global_batch_of_none_is_refused() -> None:
    with pytest.raises(UserError, match="--global-batch-size is 0: give a value above 0"):
        parse_run(["olmo_1b", "--global_train_batch_size=0"], "train", ranks=1)
