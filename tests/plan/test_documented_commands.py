"""The launch commands of the pages for the large recipes fit the device that they name, by the plan's estimate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commands.flags import parse_run
from pipeline.host.devices import find_device
from pipeline.plan import Plan, PlanOptions, make_plan
from pipeline.plan.zero import Counts

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/miras_64k.md", "docs/multi_node.md")
ALL = "H100"
"""The device that a command fits which names none."""
HOSTFILE = 16
"""Slots of the hostfile of docs/multi_node.md."""

_LAUNCH = re.compile(r"(?:launch\.sh|torchrun|deepspeed)\s(?P<before>.*?)(?P<words>miras_(?:32k|64k|128k)\b[^#\n]*)")


def commands(text: str) -> Iterator[tuple[str, int, str]]:
    """(recipe and flags, ranks, device) of every launch command of a page; a comment beside it or above it names the
    device."""
    above = ""
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for line in re.sub(r"\\\n\s*", " ", shell).splitlines():
        launch, (_, _, comment) = _LAUNCH.search(line), line.partition("# ")
        if launch is None:
            above = comment if line.startswith("# ") else ""
            continue
        before = launch["before"]
        ranks = 1
        for flag in ("--num_gpus", "--nproc-per-node", "--nnodes"):
            match = re.search(rf"{flag} (\d+)", before)
            ranks *= int(match[1]) if match else 1
        named = find_device(comment) or find_device(above)
        yield launch["words"].strip(), HOSTFILE if "--hostfile" in before else ranks, named.name if named else ALL
        above = ""


FOUND = [(page, *command) for page in PAGES for command in commands((ROOT / page).read_text())]


@pytest.mark.parametrize("page, words, ranks, device", FOUND)
def test_a_command_of_a_page_fits_the_device_that_it_names(page: str, words: str, ranks: int, device: str) -> None:
    config = parse_run(words.split(), "plan", ranks=ranks)
    counts = Counts(parameters=1_553_721_536, trainable=68_804_800, largest=205_520_896)
    plan: Plan = make_plan(config, PlanOptions(ranks=ranks, device=device), counts)
    assert plan.fits, f"{page}: {words} on {ranks} x {device} needs {plan.memory / 2**30:.1f} GiB"


def test_the_commands_are_found_with_their_ranks_and_devices() -> None:
    assert ("README.md", "miras_64k --batch-size 4 --grad-accum 2", 4, "H100") in FOUND
    assert ("README.md", "miras_64k", 4, "H200") in FOUND
    assert ("docs/miras_64k.md", "miras_64k --parallel.sequence 8 --batch-size 16", 16, "H100") in FOUND
    assert ("docs/miras_64k.md", "miras_64k --max_seq_length 65536 --batch_size 8", 4, "B300") in FOUND
    assert ("docs/miras_64k.md", "miras_64k --batch-size 1", 1, "RTX 4090") in FOUND
    assert len(FOUND) >= 18
