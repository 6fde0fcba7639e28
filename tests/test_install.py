"""What pip installs is whole: a wheel holds everything that a run needs, and trains where there is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pipeline.callbacks.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pipeline", "ds_configs", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", ".gitignore")


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel; dependencies are those of the environment that runs this. Returns its bin."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    pip = ["-m", "pip", "--disable-pip-version-check", "--python", python, "install", "-q", "--no-index", "--no-deps"]
    call(sys.executable, *pip, wheel, cwd=folder.parent)
    # The .pth files of that folder, an editable install of this project among them, are not read.
    (site / "outer_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the project, as a repository with one commit."""
    root = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.json")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, root / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        call(*git, *words, cwd=root)
    return root


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # tests/test_build.py has the native libraries in a wheel; compiling them again would take minutes.
    pip = ["-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder]
    call(sys.executable, *pip, ".", cwd=checkout, MNEMOS_BUILD="off")
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_every_module_and_every_deepspeed_configuration(checkout: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(checkout).as_posix() for path in (checkout / "pipeline").rglob("*.py")}
    configs = {f"pipeline/ds_configs/{path.name}" for path in (ROOT / "ds_configs").iterdir()}
    assert len(configs) >= 5
    assert modules | configs | {"pipeline/_native_build.json", "pipeline/export/model_card.md"} <= names


def test_a_source_distribution_can_build_the_same(checkout: Path, tmp_path: Path) -> None:
    call(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=checkout, MNEMOS_BUILD="off")
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (root,) = (path for path in tmp_path.iterdir() if path.is_dir())
    kinds = (("ds_configs", ".json"), ("pipeline", (".py", ".md")), ("kernels", (".cpp", ".h", ".cu", ".cuh")))
    for folder, ending in kinds:
        expected = [path for path in (checkout / folder).rglob("*") if path.name.endswith(ending)]
        assert expected and all((root / path.relative_to(checkout)).is_file() for path in expected)


def test_the_metadata_say_who_what_and_under_which_license(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    for line in ("Author: The Mnemos contributors", "License-Expression: Apache-2.0", "License-File: LICENSE"):
        assert line in text.splitlines()
    assert "# Mnemos" in text, "the description is the README"
    license_file = archive.read(metadata.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License" in license_file and "END OF TERMS AND CONDITIONS" in license_file


def test_an_installed_package_trains_outside_the_tree(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    commands = install(wheel, tmp_path / "environment")
    small = "--steps 2 --sequence-length 128 --batch-size 1 --evaluation.steps 1 --report.no-plots"
    call(
        *(commands / "mnemos", "train", "miras_tiny", "--zero", "zero3", "--output-dir", "out", *small.split()),
        cwd=outside, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert [row["step"] for row in read_rows(outside / "out" / "metrics.jsonl") if row["mode"] == "train"] == [1, 2]
    run = json.loads((outside / "out" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["commit"] == call("git", "rev-parse", "HEAD", cwd=checkout), "that of the checkout it was built from"
    where = call(commands / "python", "-c", "import pipeline; print(pipeline.__file__)", cwd=outside)
    assert Path(where).is_relative_to(tmp_path / "environment")
