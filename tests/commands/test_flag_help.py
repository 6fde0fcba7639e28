"""`--help` shows the flags that most runs need, `--help-all` every one, and a command's own come first."""

from __future__ import annotations

import re

import pytest

from pipeline.cli import main
from pipeline.commands.flag_help import COMMON, common_fields, flag_names, leaves
from pipeline.config import ModelConfig
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_recall, miras_tiny

EVERY_RECIPE = """--steps --stop-after --seed --output-dir --run-name --run-id --resume --init-from --save-every --keep
    --eval-every --batch-size --sequence-length --grad-accum --lr --warmup-steps --weight-decay --clip --precision
    --profile --dry-run --zero --parallel.sequence --data.path --data.dataset --data.mix --data.tokenizer""".split()


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    """The flags at the start of an entry in what a command answers, in order, and the whole answer."""

    def run(*words: str) -> tuple[list[str], str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capsys.readouterr()
        assert (end.value.code or 0, err) == (0, "")
        # A box has sides on a terminal alone.
        entries = re.findall(r"^[│ ] ((?:-[hv], )?--[a-z].*?)(?:  .*)?$", out, re.MULTILINE)
        return [flag for entry in entries for flag in re.findall(r"--[a-z][\w.-]*|-v\b", entry)], out

    return run


def test_help_shows_the_common_flags_and_names_the_way_to_the_others(shown) -> None:
    flags, out = shown("train", "miras_tiny", "--help")
    assert [flag for flag in EVERY_RECIPE if flag not in flags] == []
    assert {"--model.memory.rule", "--model.memory.layers", "--model.attention.window"} <= set(flags)
    assert not {"--model.memory.gate-rank", "--optimizer.betas", "--max-steps"} & set(flags)
    assert "--help-all" in out and len(flags) < len(flag_names(miras_tiny())) / 2


@pytest.mark.parametrize("recipe", [miras_tiny, miras_recall])
def test_help_all_shows_every_flag(shown, recipe) -> None:
    flags, _ = shown("train", recipe.__name__, "--help-all")
    assert [flag for flag in flag_names(recipe()) if flag not in flags] == []


def test_help_asked_for_among_other_flags_is_given(shown) -> None:
    assert (
        shown("train", "miras_tiny", "--steps", "3", "--help-all")[0] == shown("train", "miras_tiny", "--help-all")[0]
    )


@pytest.mark.parametrize("words", ["bench throughput", "bench throughput miras_tiny", "bench resume",
                                   "bench resume miras_tiny"])  # fmt: skip
def test_help_of_a_bench_lists_its_own_flags_first(shown, words: str) -> None:
    own = ["--ranks", "--bench-steps", "--repeats", "--json"]
    flags, _ = shown(*words.split(), "--help")
    assert [flag for flag in flags if flag in own] == own
    assert flags.index("--json") < flags.index("--steps") if "miras_tiny" in words else "--steps" not in flags
    assert ("--lengths" in flags) is ("throughput" in words)


def test_help_of_plan_for_a_recipe_lists_both(shown) -> None:
    flags, _ = shown("plan", "miras_tiny", "--help")
    assert {"--ranks", "--device", "--utilisation", "--steps"} <= set(flags)


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_field_called_common_exists(name: str) -> None:
    config = all_recipes()[name]()
    assert common_fields(config) <= {leaf.name for leaf in leaves(config)}


def test_a_model_without_favourites_shows_none() -> None:
    assert ModelConfig.common == () and not any(name.startswith("model.") for name in COMMON)
