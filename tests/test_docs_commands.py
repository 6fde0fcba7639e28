"""Every command that a page shows exists as it is shown, and is run where this machine can; others are marked."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.docs_commands import (
    PAGES,
    ROOT,
    RUN,
    TEXTS,
    Block,
    UnknownCommand,
    check,
    find_blocks,
    own_recipes,
)

BLOCKS = [(page, block) for page in PAGES for block in find_blocks(page.read_text())]
SMALL = "--sequence-length 64 --batch-size 1 --model.attention.window 16 --evaluation.steps 1 --report.no-plots"
PREPARE = ["train", "miras_tiny", "--steps", "1", "--output-dir", RUN, *SMALL.split()]


@functools.cache
def check_block(block: Block, own: frozenset[str]) -> list[list[str]]:
    """The commands of a block that are run here. Raises for one that is wrong, and for a mark too few or too many."""
    here = []
    left = []
    for words in block.commands():
        try:
            found = check(words, own)
        except UnknownCommand:
            found = None
        if found is None:
            left.append(" ".join(words))
        else:
            here.append(found)
    if left and block.reason is None:
        raise ValueError(f"line {block.line}: not run here, and not marked: {left[0]}")
    if not left and block.reason is not None:
        raise ValueError(f"line {block.line}: all of it is run here: the mark is not needed")
    return here


@pytest.mark.parametrize("page, block", BLOCKS, ids=[f"{page.relative_to(ROOT)}:{b.line}" for page, b in BLOCKS])
def test_a_block_of_commands_is_right_and_run_or_marked(page: Path, block: Block) -> None:
    check_block(block, own_recipes(page.read_text()))
    syntax = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert block.text.startswith("$ ") or syntax.returncode == 0, syntax.stderr


def test_the_commands_that_can_run_here_do(tmp_path: Path) -> None:
    commands = [PREPARE]
    for page, block in BLOCKS:
        commands += [words for words in check_block(block, own_recipes(page.read_text())) if words not in commands]
    kinds = {words[0] for words in commands}
    assert kinds >= {"train", "recipes", "plan", "doctor", "eval", "checkpoint"}
    (tmp_path / TEXTS).mkdir()
    for number in range(40):
        (tmp_path / TEXTS / f"{number}.txt").write_text(f"Text {number}. " * 200)
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs_commands", str(results)],
        cwd=tmp_path,
        input=json.dumps(commands),
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    failed = [
        f"{' '.join(words)}: exit code {code}\n{output}"
        for words, (code, output) in zip(commands, json.loads(results.read_text()), strict=True)
        if code != 0 or ("--dry-run" in words and "dry run: loss " not in output)
    ]
    assert not failed, "\n".join(failed)


PAGE = """\
# A page

<!-- not run here: no time -->
```bash
make test      # all of them
run=x
exec ./launch.sh --num_gpus 4 \\
    miras_64k --output-dir "$run"
```

    y = a formula

    python -m pipeline recipes

```text
$ python -m pipeline recipes
what it prints
```

```python
make test
```

```
mnemos doctor
```

<!-- output of: mnemos recipes -->
```text
$ mnemos recipes
```
"""


def test_blocks_of_commands_are_found_and_others_are_not() -> None:
    blocks = find_blocks(PAGE)
    assert [(block.line, block.reason) for block in blocks] == [(5, "no time"), (11, None), (16, None), (25, None)]
    assert blocks[0].commands() == [
        ["make", "test"],
        ["./launch.sh", "--num_gpus", "4", "miras_64k", "--output-dir", "1"],
    ]
    assert blocks[2].commands() == [["python", "-m", "pipeline", "recipes"]]


def test_a_command_inside_a_script_is_found() -> None:
    (block,) = find_blocks("```bash\nsrun bash -c 'exec ./launch.sh \"$x\" --steps 2' && [[ a ]]\n```\n")
    assert block.commands() == [["./launch.sh", "1", "--steps", "2"], ["[[", "a", "]]"]]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not run here: x -->\n",
        "<!-- not run here: x -->\ntext\n",
        "<!-- not run here: x -->\n<!-- not run here: y -->\n```bash\nls\n```\n",
        "<!-- not run here: x -->\n```python\nmake\n```\n",
    ],
)
def test_a_mark_stands_right_before_a_block_of_commands(text: str) -> None:
    with pytest.raises(ValueError, match="line 1: a mark without a block"):
        find_blocks(text)


def test_a_block_that_does_not_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2: the fenced block does not end"):
        find_blocks("\n```bash\nls\n")


@pytest.mark.parametrize(
    "line",
    [
        "./launch.sh --num_gpu 4 miras_tiny",
        "./launch.sh miras_tyni",
        "./launch.sh --num_gpus 4 miras_64k --parallel.sequence 3",
        "./launch.sh --num_gpus 4 miras_64k --no-such-flag 3",
        "./launch.sh --num_gpus x miras_64k",
        "./launch.sh --setup-onyl",
        "torchrun --nproc-per-node 3 -m pipeline train miras_64k --parallel.sequence 2",
        "torchrun --nproc-per-node 3 -m pipelines train miras_64k",
        "deepspeed --num_gpus 8 pipeline train miras_64k",
        "deepspeed --num_gpus 8 --module pipeline train miras_64",
        "mnemos trian miras_tiny",
        "mnemos train miras_tiny --steps many",
        "mnemos generate --prompt text",
        "mnemos generate outputs/olmo_tiny --promt text",
        "mnemos export outputs/olmo_tiny",
        "mnemos export outputs/olmo_tiny DIR --memry-only",
        "mnemos bench thruput",
        "mnemos bench throughput --length 64",
        "mnemos bench throughput miras_tiny --lenght 64",
        "mnemos bench kernels --shape 1",
        "mnemos bench resume --ranks two",
        "mnemos bench report",
        "python -m pytest tests/no_such_file.py",
        "python -m pytest tests/test_docs.py -k no_such_test",
        "python -m pytest tests/test_docs.py -m no_such_mark",
        "python -m pytest tests/test_docs.py --no-such-flag",
        "make tset",
        "make test NO_SUCH=1",
        "docker run an-image ./launch.sh no_such_recipe",
    ],
)
def test_a_wrong_command_is_an_error_although_it_is_marked(line: str) -> None:
    (block,) = find_blocks(f"<!-- not run here: x -->\n```bash\n{line}\n```\n")
    with pytest.raises((UserError, ValueError)):
        check_block(block, frozenset())


@pytest.mark.parametrize("line", ["ls", "make test", "./launch.sh --num_gpus 4 miras_64k", "mnemos bench kernels"])
def test_what_is_not_run_needs_a_mark(line: str) -> None:
    (block,) = find_blocks(f"```bash\n{line}\n```\n")
    with pytest.raises(ValueError, match="not run here, and not marked"):
        check_block(block, frozenset())
    (block,) = find_blocks(f"<!-- not run here: x -->\n```bash\n{line}\n```\n")
    assert check_block(block, frozenset()) == []


def test_what_is_run_needs_no_mark() -> None:
    (block,) = find_blocks("<!-- not run here: x -->\n```bash\nmnemos train miras_tiny --seed 3\n```\n")
    with pytest.raises(ValueError, match="the mark is not needed"):
        check_block(block, frozenset())


def test_a_recipe_that_a_page_defines_is_not_run() -> None:
    page = "```python\ndef mine():\n    pass\n```\n```bash\nmnemos eval outputs/mine\n```\n"
    assert own_recipes(page) == {"mine"}
    (block,) = find_blocks(page)
    with pytest.raises(ValueError, match="not marked"):
        check_block(block, own_recipes(page))
