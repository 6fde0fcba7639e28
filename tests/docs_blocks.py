"""Blocks of the pages that show what a command prints, made by running it.

A block is a comment that names the command, and right below it a fenced block, which is replaced as a whole::

    <!-- output of: python -m pipeline recipes -->
    ```text
    $ python -m pipeline recipes
    ...
    ```

The command must need no network and no device, and print the same everywhere. ``python -m tests.docs_blocks`` (``make
docs``) runs every command and rewrites the pages; a test fails where a page shows something else.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"COLUMNS": "120", "NO_COLOR": "1", "DS_ACCELERATOR": "cpu"}
"""What commands are run with, so that they print the same on every machine."""

_MARKER = re.compile(r"<!-- output of: (.+?) -->\s*")
_FENCE = re.compile(r"(`{3,}|~{3,})")


@dataclass(frozen=True)
class Block:
    """A generated block of a page."""

    command: str
    start: int
    """Index of the first line inside the fence."""
    end: int
    """Index of the line that closes it."""
    line: int
    """Number of the marker's line, from 1."""


def pages() -> list[Path]:
    """Every page of the project."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")])


def find_blocks(text: str) -> Iterator[Block]:
    """The blocks of a page; markers inside other fenced blocks are examples. Raises ValueError for a marker without a
    block, or with one that does not end."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        marker, fence = _MARKER.fullmatch(lines[index]), _FENCE.match(lines[index])
        if marker is not None:
            fence = _FENCE.match(lines[index + 1]) if index + 1 < len(lines) else None
            if fence is None:
                raise ValueError(f"line {index + 1}: no fenced block stands below '{lines[index]}'")
        if fence is not None:
            first = index + (2 if marker is not None else 1)
            end = next((i for i in range(first, len(lines)) if lines[i].rstrip() == fence[1]), None)
            if end is None:
                raise ValueError(f"line {index + 1}: the fenced block does not end")
            if marker is not None:
                yield Block(marker[1], first, end, index + 1)
            index = end
        index += 1


def run(command: str) -> str:
    """What a block of a command holds: the command and what it prints. Raises RuntimeError when it fails.

    The project's own commands run in this process, whose imports they share.
    """
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "pipeline"]:
        printed, code = _run_here(words[3:])
    else:
        words[0] = sys.executable if words[0] == "python" else words[0]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
        printed, code = done.stdout, done.returncode
    if code != 0:
        raise RuntimeError(f"{command}: exit code {code}")
    return f"$ {command}\n{printed.rstrip()}\n"


def _run_here(words: list[str]) -> tuple[str, int]:
    from pipeline.cli import main

    before = dict(os.environ)
    printed = io.StringIO()
    os.environ.update(ENVIRONMENT)
    try:
        with contextlib.redirect_stdout(printed):
            code = main(words)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return printed.getvalue(), code


def shown(text: str, block: Block) -> str:
    """What a page shows in a block."""
    return "".join(line + "\n" for line in text.splitlines()[block.start : block.end])


def rewritten(text: str) -> str:
    """A page with every block as its command prints it."""
    lines = text.splitlines()
    for block in reversed(list(find_blocks(text))):
        lines[block.start : block.end] = run(block.command).splitlines()
    return "".join(line + "\n" for line in lines)


def main() -> None:
    """Rewrites the pages, and names those that changed."""
    for page in pages():
        text = page.read_text()
        new = rewritten(text)
        if new != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: rewritten")


if __name__ == "__main__":
    main()
