"""The run directory follows from --run-name and --run-id, or is what --output-dir says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.commands.flags import parse_run
from pipeline.commands.preflight import preflight
from pipeline.config import RunConfig, replace
from pipeline.config_file import load_config, save_config, to_plain
from pipeline.errors import UserError
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_tiny
from pipeline.run_name import in_folder, new_folder


def parsed(*words: str) -> RunConfig:
    return parse_run(["miras_tiny", *words], "train")


@pytest.mark.parametrize(
    "words, folder, run_id",
    [
        ("", "outputs/miras_tiny", None),
        ("--output-dir some/where", "some/where", None),
        ("--run-name exp", "outputs/exp", None),
        ("--run_name=exp", "outputs/exp", None),
        ("--run-name exp --run-id first", "outputs/exp/first", None),
        ("--run-name exp --run-id auto", "outputs/exp", "auto"),
        ("--run-id auto", "outputs/miras_tiny", "auto"),
        ("--run-id first", "outputs/miras_tiny/first", None),
        ("--run-name auto", "outputs/auto", None),
    ],
)
def test_names_mean_a_folder(words: str, folder: str, run_id: str | None) -> None:
    assert parsed(*words.split()) == replace(miras_tiny(), output_dir=Path(folder), run_id=run_id)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--output-dir a --run-name b", "--output-dir and --run-name are both given: keep one"),
        ("--output_dir=a --run_name=b", "--output-dir and --run-name are both given: keep one"),
        ("--run-id auto --output-dir a", "--output-dir and --run-id are both given: keep one"),
        ("--output-dir outputs/miras_tiny --run-name b", "--output-dir and --run-name are both given"),
        ("--run-name a/b", "--run-name is 'a/b': give the name of one folder, without /"),
        ("--run-name ..", "--run-name is '..': give the name of one folder, without /"),
        ("--run-name=", "--run-name is '': give the name of one folder, without /"),
        ("--run-id /tmp", "--run-id is '/tmp': give the name of one folder, without /"),
        ("--run-name a --run-id auto --resume must", "--resume must goes on with a run, and --run-id auto begins one"),
    ],
)
def test_what_names_no_folder_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parsed(*words.split())


@pytest.fixture
def file(tmp_path: Path):
    """The path of a --config file over miras_tiny."""

    def write(**content: object) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"recipe": "miras_tiny", **content}))
        return str(path)

    return write


@pytest.mark.parametrize(
    "content, words, folder",
    [
        ({"run_name": "exp"}, "", "outputs/exp"),
        ({"run_name": "exp"}, "--run-name other", "outputs/other"),
        ({"run_name": "exp", "run_id": "first"}, "", "outputs/exp/first"),
        ({"run_name": "exp"}, "--run-id first", "outputs/exp/first"),
        ({"run_name": "exp", "run_id": "first"}, "--output-dir a", "a"),
        ({"output_dir": "a"}, "--run-name exp", "outputs/exp"),
        ({"output_dir": "a"}, "--run-name exp --run-id first", "outputs/exp/first"),
    ],
)
def test_a_flag_stands_over_a_config_file(file, content: dict, words: str, folder: str) -> None:
    config = parse_run(["--config", file(**content), *words.split()], "train")
    assert (config.output_dir, config.run_name, config.run_id) == (Path(folder), None, None)


@pytest.mark.parametrize(
    "content, words, message",
    [
        ({"output_dir": "a", "run_name": "exp"}, "", "--config gives output_dir and run_name: keep one"),
        ({"output_dir": "a"}, "--run-id auto", "--run-id auto: --config names a folder of its own: give --run-name"),
    ],
)
def test_a_config_file_that_names_the_folder_twice_is_refused(file, content: dict, words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_run(["--config", file(**content), *words.split()], "train")


def test_a_saved_config_goes_on_in_its_folder(tmp_path: Path) -> None:
    started = in_folder(parsed("--run-name", "exp", "--run-id", "auto"), Path("outputs/exp/20260131_093000"))
    save_config(started, tmp_path / "config.yaml")
    again = parse_run(["--config", str(tmp_path / "config.yaml")], "train")
    assert again == started and new_folder(again) == started.output_dir


def test_a_config_of_before_there_were_names_is_still_read(tmp_path: Path) -> None:
    plain = to_plain(replace(miras_tiny(), output_dir=Path("old")))
    older = {key: value for key, value in plain.items() if key not in ("run_name", "run_id", "keep_every")}
    del older["report"]["plot_every"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    assert load_config(tmp_path / "config.yaml", all_recipes()) == replace(miras_tiny(), output_dir=Path("old"))


def test_every_start_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = replace(miras_tiny(), output_dir=tmp_path / "exp", run_id="auto")
    found = []
    for _ in range(3):
        folder = new_folder(config)
        folder.mkdir(parents=True)
        found.append(folder)
    assert len(set(found)) == 3 and found == sorted(found)
    assert all(path.parent == config.output_dir and re.fullmatch(r"\d{8}_\d{6}", path.name) for path in found)


def test_the_checks_make_no_folder_and_pass_over_the_run_beside(tmp_path: Path, monkeypatch) -> None:
    """A run that was saved as outputs/NAME is another one than those below outputs/NAME."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "exp" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("some words to read. " * 4000)
    words = ["--run-name", "exp", "--data.path", str(tmp_path / "text.txt"), "--sequence-length", "128"]
    with pytest.raises(UserError, match="checkpoint-5"):
        preflight(parsed(*words), ranks=2)
    before = sorted(tmp_path.rglob("*"))
    preflight(parsed(*words, "--run-id", "auto"), ranks=2)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []
