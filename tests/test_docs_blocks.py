"""What the pages show of a command is what it prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import docs_blocks
from tests.docs_blocks import Block, find_blocks, pages, rewritten, run, shown

BLOCKS = [(page, block) for page in pages() for block in find_blocks(page.read_text())]


@pytest.mark.parametrize(
    "page, block", BLOCKS, ids=[f"{page.relative_to(docs_blocks.ROOT)}:{block.line}" for page, block in BLOCKS]
)
def test_a_page_shows_what_its_command_prints(page: Path, block: Block) -> None:
    assert shown(page.read_text(), block) == run(block.command), "run `make docs`"


def test_there_are_blocks_of_the_plan() -> None:
    assert {page.name for page, block in BLOCKS if " plan " in block.command} >= {"plan.md", "miras_64k.md"}


PAGE = """\
# A page

<!-- output of: python -c "print('a'); print('b')" -->
```text
stale
```

````markdown
<!-- output of: python -m an.example -->
```text
```
````

<!-- another comment -->
~~~
<!-- output of: no command -->
~~~
the end
"""


def test_blocks_are_found_and_examples_of_them_are_not() -> None:
    (block,) = find_blocks(PAGE)
    assert (block.command, block.line) == ("python -c \"print('a'); print('b')\"", 3)
    assert shown(PAGE, block) == "stale\n"


def test_a_page_is_rewritten_between_its_fences_alone() -> None:
    made = "$ python -c \"print('a'); print('b')\"\na\nb\n"
    assert rewritten(PAGE) == PAGE.replace("stale\n", made)
    assert rewritten(rewritten(PAGE)) == rewritten(PAGE)


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- output of: x -->\n\n```\n```\n", "line 1: no fenced block"),
        ("a\n<!-- output of: x -->", "line 2: no fenced block"),
        ("<!-- output of: x -->\n```text\na\n", "line 1: the fenced block does not end"),
        ("```\na\n", "line 1: the fenced block does not end"),
    ],
)
def test_a_marker_without_a_whole_block_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(find_blocks(text))


def test_a_command_that_fails_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run('python -c "raise SystemExit(3)"')
    with pytest.raises(RuntimeError, match="exit code 2"):
        run("python -m pipeline plan no_such_recipe")


def test_the_projects_commands_run_here_and_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "37")
    before = dict(os.environ)
    printed = run("python -m pipeline recipes")
    assert printed.startswith("$ python -m pipeline recipes\ncvfp_100k  ") and "\nmiras_128k  " in printed
    assert dict(os.environ) == before


def test_make_docs_writes_the_pages_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs_blocks, "ROOT", tmp_path)
    (tmp_path / "stale.md").write_text(PAGE)
    (tmp_path / "plain.md").write_text("no block\n")
    docs_blocks.main()
    assert capsys.readouterr().out == "stale.md: rewritten\n"
    assert (tmp_path / "stale.md").read_text() == rewritten(PAGE)
    docs_blocks.main()
    assert capsys.readouterr().out == ""
