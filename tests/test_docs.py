"""The pages are true: links lead somewhere, nothing is left to fill in, and the example system really trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.callbacks.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")])


def headings(text: str) -> set[str]:
    """The names by which GitHub links to a page's sections."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_sections_are_linked_to_by_their_names() -> None:
    assert headings("# A page\n\n## What's `this`: a *test*?\n```\n# none\n```\n") == {"a-page", "whats-this-a-test"}


def test_the_index_names_every_page_once() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    named = re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \|", index, re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix == ".md" or path.name == "decisions"}
    inside = sorted(name for name in named if not name.startswith("../"))
    assert inside == sorted(pages - {"README.md", "glossary.md"})
    assert "(glossary.md)" in index


def test_the_glossary_is_in_order() -> None:
    rows = re.findall(r"^\| ([a-z][^|]*) \| ", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = rows[1:]  # the table's head
    assert words == sorted(words, key=str.lower)
    assert {"branch", "carry", "rank", "row", "sink", "stream"} <= set(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if not re.match(r"[a-z]+://|mailto:", target):
            other = page if not target else page.parent / target
            assert other.exists(), f"dead link {target}"
            assert not anchor or anchor in headings(other.read_text()), f"{target} has no section #{anchor}"
    assert text.strip(), "an empty page"
    assert not re.search(r"^(TODO|TBD|FIXME|[A-Z][A-Z_]{3,})$", text, re.MULTILINE)


def test_the_example_system_trains_and_is_planned_for(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    page = (ROOT / "docs" / "adding_a_system.md").read_text()
    files = re.findall(r"^`(pipeline/\S+\.py)`\n\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(files) == 4
    for name, code in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    words = ["train", "gru_tiny", "--steps", "3", "--output-dir", "out"]
    # In one process: most of either is imports.
    script = f"import sys; from pipeline.cli import main; sys.exit(main({words}) or main(['plan', 'gru_tiny']))"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "gru_tiny on 1 x H200" in done.stdout and "  activations " in done.stdout
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if row["mode"] == "train"]
    assert [(row["phase"], row["phase_step"]) for row in rows] == [
        ("whole", 1),
        ("whole", 2),
        ("whole", 3),
        ("head", 1),
    ]
    assert rows[2]["loss"] < rows[0]["loss"] and rows[3]["lr"] == pytest.approx(3e-4)
    assert "phase head " in " ".join(done.stdout.split())
