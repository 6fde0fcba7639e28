"""The Dockerfile is one that can be built: what it copies is there, and is enough for set-up."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) in order, without comments and with lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).split("\n")
    return [(words[0], words[1]) for line in lines if len(words := line.split(maxsplit=1)) == 2]


def copied(text: str) -> tuple[list[str], str]:
    """What a COPY takes, and where it goes."""
    *sources, target = text.split()
    return sources, target


def ignored(name: str) -> bool:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    parts = Path(name).parts
    return any(
        fnmatch.fnmatch(parts[-1], pattern[3:]) if pattern.startswith("**/") else fnmatch.fnmatch(parts[0], pattern)
        for pattern in patterns
    )


def test_the_image_is_the_one_that_the_docs_name() -> None:
    (image,) = (text for name, text in instructions() if name == "FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)
    assert image in (ROOT / "docs" / "miras_64k.md").read_text()


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [source for name, text in instructions() if name == "COPY" for source in copied(text)[0]]
    assert "." in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source == "." or not ignored(source), source


def test_what_is_made_on_a_machine_stays_out_of_the_image() -> None:
    for name in (".venv", ".git", "build", "outputs", "pipeline/_native_cpu.abi3.so", "pipeline/_native_build.json"):
        assert ignored(name), name
    for name in ("launch.sh", "ds_configs", "pipeline/train.py", "kernels", "tests", "docs"):
        assert not ignored(name), name


def test_set_up_finds_all_that_it_needs_in_what_was_copied_before_it(tmp_path: Path) -> None:
    steps = instructions()
    set_up = steps.index(("RUN", "./launch.sh --setup-only"))
    for name, text in steps[:set_up]:
        if name != "COPY":
            continue
        sources, target = copied(text)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target)
            else:
                (tmp_path / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    # The first word of every path that launch.sh and setup.py name below the root is among them.
    named = re.findall(r"(?:\$ROOT|\$\{ROOT\})/([\w.]+)", (ROOT / "launch.sh").read_text())
    assert {"constraints.txt", "pipeline"} <= set(named)
    assert all((tmp_path / name).exists() for name in named if name != ".venv")
    environment = {**os.environ, "MNEMOS_BUILD": "off"}
    for command in ([sys.executable, "setup.py", "-q", "egg_info"], ["./launch.sh", "--help"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert ("COPY", ". .") in steps[set_up:], "the rest comes after set-up"


def test_it_starts_launch_sh() -> None:
    (text,) = (text for name, text in instructions() if name == "ENTRYPOINT")
    assert json.loads(text) == ["./launch.sh"]
