"""The package finds what belongs to it, in a checkout and where it was installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline import __version__
from pipeline.host.package import built_commit, config_folder, how_to_set_up


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "pipeline").mkdir()
    return tmp_path / "pipeline"


def test_configurations_are_beside_the_package_in_a_checkout(package: Path) -> None:
    assert config_folder(package) == package.parent / "ds_configs"
    assert (config_folder() / "zero3.json").is_file()


def test_configurations_are_in_the_package_once_it_is_installed(package: Path) -> None:
    (package.parent / "ds_configs").mkdir()  # somebody else's, in site-packages
    (package / "ds_configs").mkdir()
    assert config_folder(package) == package / "ds_configs"


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("\n", None), ("1a2b+\n", "1a2b+")])
def test_the_commit_is_what_the_build_noted(package: Path, text: str | None, expected: str | None) -> None:
    if text is not None:
        (package / "_commit").write_text(text)
    assert built_commit(package) == expected


def test_the_citation_and_the_license_are_of_this_version() -> None:
    root = config_folder().parent
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (__version__, "Apache-2.0")
    assert "Version 2.0, January 2004" in (root / "LICENSE").read_text()


def test_set_up_is_launch_sh_in_a_checkout_and_pip_elsewhere(package: Path) -> None:
    assert "pip" in how_to_set_up(package) and "launch.sh" not in how_to_set_up(package)
    (package.parent / "launch.sh").touch()
    assert how_to_set_up(package) == how_to_set_up() == "run ./launch.sh --setup-only"
