"""A config survives its YAML file, and a file that is wrong says where."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import RunConfig, replace
from pipeline.config_file import load_config, merge, save_config, states, to_plain
from pipeline.data_config import RecallConfig
from pipeline.errors import UserError
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_recall, miras_tiny

RECIPES = all_recipes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refusal(file: Path, content: str | dict[str, Any]) -> str:
    """The one line that loading such a file ends with."""
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        load_config(file, RECIPES)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_its_file(name: str, file: Path) -> None:
    config = RECIPES[name]()
    save_config(config, file)
    assert load_config(file, RECIPES) == config


def test_a_config_far_from_its_recipe_survives(file: Path) -> None:
    changed = replace(
        miras_tiny(),
        output_dir=Path("some where/else"),
        init_from=Path("old/checkpoint-3"),
        stop_after=7,
        lr=1.2345678901234567e-5,
        data__path=("a.txt", "b*.jsonl"),
        data__tokenizer="123",
        optimizer__betas=(0.8, 0.99),
        report__wandb="no",
        report__peak_tflops=1.5,
    )
    save_config(changed, file)
    loaded = load_config(file, RECIPES)
    assert loaded == changed
    assert isinstance(loaded.output_dir, Path) and isinstance(loaded.init_from, Path)
    assert isinstance(loaded.data.path, tuple) and isinstance(loaded.optimizer.betas, tuple)


def test_the_file_holds_plain_values_alone() -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        if isinstance(value, list):
            return [leaf for item in value for leaf in leaves(item)]
        return [value]

    assert {type(leaf) for leaf in leaves(to_plain(miras_recall()))} <= {str, int, float, bool, type(None)}


def test_a_file_of_a_few_keys_stands_on_its_recipe(file: Path) -> None:
    file.write_text("recipe: miras_tiny\nsteps: 3\nlr: 1e-4\nmodel:\n  memory:\n    layers: [2]\n    heads: 2\n")
    loaded, recipe = load_config(file, RECIPES), miras_tiny()
    assert (loaded.steps, loaded.lr, loaded.model.memory.layers, loaded.model.memory.heads) == (3, 1e-4, (2,), 2)
    assert (loaded.model.backbone, loaded.data) == (recipe.model.backbone, recipe.data)


def test_an_optional_section_is_read_where_the_recipe_has_none(file: Path) -> None:
    file.write_text(
        "recipe: miras_tiny\ndata:\n  recall: {keys: 16, values: 8, fillers: 8, pairs: 2, queries: 2, max_gap: 90}\n"
    )
    expected = RecallConfig(keys=16, values=8, fillers=8, pairs=2, queries=2, max_gap=90)
    assert load_config(file, RECIPES).data.recall == expected


def test_an_optional_section_is_taken_away_by_null(file: Path) -> None:
    file.write_text("recipe: miras_recall\ndata:\n  recall: null\n")
    assert load_config(file, RECIPES).data.recall is None


def before(config: RunConfig) -> dict:
    """The config as older files have it, when the recall task stood in the model's section."""
    plain = to_plain(config)
    plain["model"]["recall"] = plain["data"].pop("recall")
    return plain


@pytest.mark.parametrize("recipe", ["miras_recall", "miras_recall_moneta", "miras_tiny"])
def test_an_older_file_means_the_same(file: Path, recipe: str) -> None:
    config = RECIPES[recipe]()
    file.write_text(yaml.safe_dump(before(config)))
    assert load_config(file, RECIPES) == config


@pytest.mark.parametrize(
    "content, expected",
    [
        ("recipe: miras_recall\nmodel: {recall: {pairs: 4, queries: 4}}", RecallConfig(16, 16, 16, pairs=4, queries=4)),
        ("recipe: miras_tiny\nmodel: {recall: {keys: 9}}\ndata: {min_tokens: 0}", RecallConfig(keys=9)),
        ("recipe: miras_recall\nmodel: {recall: null}", None),
        ("recipe: miras_recall\nmodel: {recall: {keys: 9}}\ndata:", RecallConfig(9, 16, 16)),
    ],
)
def test_a_task_in_the_models_section_is_read_as_before(file: Path, content: str, expected: object) -> None:
    file.write_text(content)
    assert load_config(file, RECIPES).data.recall == expected


def test_a_task_at_both_places_is_refused(file: Path) -> None:
    both = {"recipe": "miras_recall", "model": {"recall": {"keys": 9}}, "data": {"recall": {"keys": 8}}}
    assert "model: recall is now data: recall, and both are given" in refusal(file, both)


@pytest.mark.parametrize("recipe", ["miras_recall", "miras_tiny"])
def test_an_unknown_key_of_the_task_in_an_older_file_is_named(file: Path, recipe: str) -> None:
    assert "'gaps'" in refusal(file, {"recipe": recipe, "model": {"recall": {"gaps": 3}}})


@pytest.mark.parametrize("content", [{"model": {"recall": {}}, "data": 3}, {"model": 3, "data": {}}, {"model": [1]}])
def test_sections_that_are_none_are_refused_with_an_older_files_task_too(file: Path, content: dict) -> None:
    assert refusal(file, {"recipe": "miras_recall", **content})


@pytest.mark.parametrize("recipe", ["miras_recall", "miras_tiny"])
def test_an_unknown_key_of_an_optional_section_is_named(file: Path, recipe: str) -> None:
    assert "'gaps'" in refusal(file, {"recipe": recipe, "data": {"recall": {"gaps": 3}}})


@pytest.mark.parametrize(
    "content, words",
    [
        ({"recipe": "miras_tiny", "stepz": 3}, ["'stepz'", "steps"]),
        ({"recipe": "miras_tiny", "model": {"memory": {"head": 2}}}, ["model", "memory", "'head'", "head_dim"]),
        ({"recipe": "miras_tiny", 5: 1, "stepz": 3}, ["unknown key"]),
        ({"recipe": "miras_tiny", "steps": "many"}, ["steps", "integer", "'many'"]),
        ({"recipe": "miras_tiny", "steps": 1.5}, ["steps", "1.5"]),
        ({"recipe": "miras_tiny", "steps": True}, ["steps", "True"]),
        ({"recipe": "miras_tiny", "lr": None}, ["lr", "None"]),
        ({"recipe": "miras_tiny", "output_dir": 5}, ["output_dir", "5"]),
        ({"recipe": "miras_tiny", "precision": "fp8"}, ["precision", "'fp8'", "'bf16'"]),
        ({"recipe": "miras_tiny", "data": {"path": "books"}}, ["data", "path", "'books'"]),
        ({"recipe": "miras_tiny", "optimizer": {"betas": [0.9]}}, ["optimizer", "betas", "[0.9]"]),
        ({"recipe": "miras_tiny", "model": {"memory": {"rule": "hebb"}}}, ["model", "memory", "rule", "'hebb'"]),
        ({"recipe": "miras_tiny", "model": 3}, ["model", "3"]),
        ({"recipe": "miras_tiny", "data": None}, ["data", "None"]),
        ({"recipe": "miras_giant"}, ["`recipe`", "miras_tiny"]),
        ({"steps": 3}, ["`recipe`", "miras_tiny"]),
        ("", ["`recipe`"]),
        ("- recipe\n- steps\n", ["`recipe`"]),
        ("recipe: miras_tiny\nsteps: 3\nsteps: 4\n", ["'steps'", "twice"]),
        ("recipe: miras_tiny\ndata: {split: train, split: test}\n", ["'split'", "twice"]),
        ("recipe: miras_tiny\n5: 1\n5: 2\nsteps: 1\nsteps: 2\n", ["line 3", "5 is given twice"]),
        ("recipe: miras_tiny\n[1]: 1\n[1]: 2\n", ["[1] is given twice"]),
        ("recipe: [miras_tiny\n", ["line 2", "not YAML", "correct it"]),
        ("recipe: miras_tiny\nsteps: " + "9" * 5000, ["not YAML", "4300"]),
        ("recipe: miras_tiny\nseed: 2026-13-45", ["not YAML", "month"]),
        ("recipe: \0", ["not YAML", "#x0000"]),
        ("recipe: miras_tiny\ndata: " + "[" * 1000, ["nested too deeply"]),
        ('recipe: miras_tiny\noutput_dir: "a\\0b"', ["output_dir", "'a\\x00b'", "cannot name anything"]),
        ('recipe: miras_tiny\ndata: {path: ["\\ud800"]}', ["data", "path", "cannot name anything"]),
        (f"recipe: miras_tiny\nsteps: {'x' * 5000}", ["steps", "cannot name anything", "xxx...xxx"]),
        ("recipe: miras_tiny\ndata: &a {path: [*a]}", ["data", "path", "string"]),
        ("recipe: miras_tiny\nlr: 0\n", ["--lr is 0"]),
        ("recipe: !!python/object/apply:os.getcwd []\n", ["not YAML"]),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_what_is_wrong_with_a_file_is_named(file: Path, content: str | dict[str, Any], words: list[str]) -> None:
    message = refusal(file, content)
    assert [word for word in words if word not in message] == []


def test_a_recipe_that_is_no_name_is_refused(file: Path) -> None:
    assert "`recipe`" in refusal(file, {"recipe": ["miras_tiny"]})


def test_a_value_that_the_config_refuses_keeps_its_own_reason_after_the_file(file: Path) -> None:
    file.write_text("recipe: miras_tiny\nsteps: -3\n")
    with pytest.raises(UserError, match=rf"--config {file}: --steps is -3: give 0 or more"):
        load_config(file, RECIPES)


def test_values_that_repeat_each_other_are_not_written_out(file: Path) -> None:
    """Each level names the one before nine times: in full it would fill any memory."""
    levels = [f"&{name} [{', '.join(['*' + before] * 9)}]" for before, name in itertools.pairwise("abcdefghij")]
    file.write_text("recipe: miras_tiny\nzero: [&a [x], " + ", ".join(levels) + "]\n")
    assert len(refusal(file, file.read_text())) < 400


@pytest.mark.parametrize(
    ("text", "keys", "found"),
    [
        ("parallel: {sequence: 2}", ("parallel", "sequence"), True),
        ("parallel: {sequence: null}", ("parallel", "sequence"), True),
        ("parallel: {timeout_minutes: 2}", ("parallel", "sequence"), False),
        ("parallel: 2", ("parallel", "sequence"), False),
        ("[parallel]", ("parallel", "sequence"), False),
        ("", ("parallel",), False),
    ],
)
def test_what_a_file_states(file: Path, text: str, keys: tuple[str, ...], found: bool) -> None:
    file.write_text(text)
    assert states(file, *keys) is found


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml", RECIPES)


def test_a_file_that_is_no_text_is_named(file: Path) -> None:
    file.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_config(file, RECIPES)


def test_merge_leaves_its_arguments_alone() -> None:
    recipe, changes = miras_tiny(), {"model": {"memory": {"heads": 2}}}
    merged = merge(recipe, changes, "here")
    assert isinstance(merged, RunConfig) and merged.model.memory.heads == 2
    assert recipe == miras_tiny() and changes == {"model": {"memory": {"heads": 2}}}


def test_leave_to_run_foreign_code_is_typed_and_never_saved(file: Path) -> None:
    config = miras_tiny()
    save_config(dataclasses.replace(config, data=dataclasses.replace(config.data, trust_remote_code=True)), file)
    assert load_config(file, all_recipes()) == config
