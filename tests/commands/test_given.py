"""What a command line gives is known by itself, also where it gives what stands by default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.commands.flags import RECORDED, parse_flags, parse_run
from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_recall, miras_tiny


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", set()),
        ("--seed 3 --data.text-field path --resume parallel.sequence", set()),
        ("--output_dir=outputs/miras_tiny", {"output_dir"}),
        ("--run-name a --run-id None", {"run_name", "run_id"}),
        ("--parallel.sequence 2", {"parallel.sequence"}),
        ("--parallel.sequence=2 --parallel.timeout-minutes 3", {"parallel.sequence"}),
        ("--data.path", {"data.path"}),
        ("--data.path a b --seed 3", {"data.path"}),
        ("--data.dataset None", {"data.dataset"}),
        ("--data.mix a=1 b=2 --seed 3", {"data.mix"}),
    ],
)
def test_a_flag_is_given_whatever_its_value(words: str, names: set[str]) -> None:
    given: set[str] = set()
    default = replace(miras_tiny(), data__dataset=None)
    assert default.parallel.sequence == 2
    parsed: RunConfig = parse_flags(default, words.split(), "train", given=given)
    assert given == names
    assert parsed == parse_flags(default, words.split(), "train"), "recording changes no value"


@pytest.mark.parametrize("command", ["train", "check", "plan", "bench throughput"])
@pytest.mark.parametrize(
    "words", ["--data.recall.max-gap 100", "--model.recall.max-gap=100", "--model.recall.max_gap 100"]
)
def test_the_recall_task_has_its_older_flags_too(command: str, words: str) -> None:
    config = parse_run(["miras_recall", *words.split()], command)
    assert config == replace(miras_recall(), data__recall=dataclasses.replace(miras_recall().data.recall, max_gap=100))


def test_every_recipe_has_the_fields_whose_flags_are_recorded() -> None:
    for name, recipe in all_recipes().items():
        given: set[str] = set()
        assert parse_flags(recipe(), ["--parallel.sequence", "1"], name, given=given).parallel.sequence == 1
        assert given == {"parallel.sequence"} <= set(RECORDED)


@pytest.mark.parametrize(
    ("source", "words", "path", "dataset"),
    [
        ("path: [x]", "", ("x",), None),
        ("dataset: stdlib", "", (), "stdlib"),
        ("dataset: stdlib", "--data.path a", ("a",), None),
        ("path: [x]", "--data.dataset stdlib", (), "stdlib"),
        ("path: [x]", "--data.path", (), None),
        ("dataset: stdlib", "--data.dataset None", (), None),
    ],
)
def test_a_source_that_is_named_replaces_the_one_that_stands_there(
    source: str, words: str, path: tuple[str, ...], dataset: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"recipe: miras_tiny\ndata: {{{source}}}\n")
    data = parse_run(["--config", str(file), *words.split()], "train").data
    assert (data.path, data.dataset) == (path, dataset)


@pytest.mark.parametrize(
    ("source", "words", "expected"),
    [
        ("mix: [a=1, b=2]", "", ((), None, ("a=1", "b=2"))),
        ("mix: [a=1, b=2]", "--data.path x", (("x",), None, ())),
        ("mix: [a=1, b=2]", "--data.dataset stdlib", ((), "stdlib", ())),
        ("mix: [a=1, b=2]", "--data.mix c=1", ((), None, ("c=1",))),
        ("mix: [a=1, b=2]", "--data.mix", ((), None, ())),
        ("path: [x]", "--data.mix c=1 d=2", ((), None, ("c=1", "d=2"))),
        ("dataset: stdlib", "--data.mix c=1", ((), None, ("c=1",))),
    ],
)
def test_so_does_a_mixture_and_it_is_replaced_too(
    source: str, words: str, expected: tuple[object, ...], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"recipe: miras_tiny\ndata: {{{source}}}\n")
    data = parse_run(["--config", str(file), *words.split()], "train").data
    assert (data.path, data.dataset, data.mix) == expected


def test_two_sources_are_refused() -> None:
    with pytest.raises(UserError, match="both given: name one source"):
        parse_run(["miras_tiny", "--data.path", "a", "--data.dataset", "stdlib"], "train")
