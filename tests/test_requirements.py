"""Every requirement has a lowest version, which `make lowest` installs, and the tested one is in its range."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def requirements() -> list[Requirement]:
    """Those of setup.py, extras included."""
    values = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id in ("REQUIREMENTS", "EXTRAS")
    }
    extras = [text for texts in values["EXTRAS"].values() for text in texts]
    return [Requirement(text) for text in [*values["REQUIREMENTS"], *extras]]


def pins() -> dict[str, str]:
    """Versions in constraints.txt, by name."""
    found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_has_a_lowest_version_and_its_pin_is_in_range(requirement: Requirement) -> None:
    assert [bound.operator for bound in requirement.specifier] == [">="]
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is None or requirement.specifier.contains(pin)
