"""Two nodes: started over ssh, by hand and by torchrun; stopped, cut off from each other, and resumed.

One run goes through all of it, so that what it has learnt at the end tells whether any of that changed a bit.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.forked import forked
from tests.launch.nodes import ADDRESSES, Nodes, missing, two_nodes, until
from tests.launch.test_train import SMALL, losses

RUN = [*SMALL, "--parallel.sequence", "2", "--steps", "40", "--save-every", "4", "--report.no-plots"]
TIMEOUT_MINUTES = 0.2
MASTER = ["--master_addr", ADDRESSES[0]]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with two_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


class OneHost:
    """The same run on one host with two ranks, uninterrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def losses(self, steps: int) -> list[float]:
        """The losses of the first steps, made when they are asked for."""
        if not self.folder.exists():
            words = ["miras_tiny", *RUN, "--stop-after", str(steps), "--output-dir", str(self.folder)]
            done = forked(2, "pipeline", "train", *words)
            assert done.returncode == 0, done.stdout + done.stderr
        return losses(self.folder)[:steps]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> OneHost:
    return OneHost(tmp_path_factory.mktemp("one-host") / "run")


def latest(folder: Path) -> int:
    return int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("checkpoint-"))


def at_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until a run has logged a step."""

    def there() -> bool:
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        return (folder / "metrics.jsonl").exists() and len(losses(folder)) >= step

    until(there, 150, f"step {step} does not come")


def end(process: subprocess.Popen[str], seconds: float = 150) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


@pytest.mark.timeout(550)
def test_a_run_on_two_nodes_survives_what_happens_to_it(nodes: Nodes, one_host: OneHost, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["miras_tiny", *RUN, "--output-dir", str(folder)]

    # Over ssh, with pdsh; a scheduler wants the nodes back.
    process = nodes.launch([*MASTER, *words])
    at_step(folder, 2, process)
    nodes.signal(process, signal.SIGTERM)
    code, output = end(process)
    assert code == 143, output
    # The one that runs where launch.sh does: the other node's hears of it from that.
    assert "SIGTERM is passed on to the ranks of this machine (1)" in output
    stopped = latest(folder)
    assert stopped == len(losses(folder))
    until(lambda: not nodes.processes(), 10, f"left behind: {nodes.processes()}")

    # The cable is pulled in the middle of a step.
    limit = ["--parallel.timeout-minutes", str(TIMEOUT_MINUTES)]
    process = nodes.launch([*MASTER, *words, "--resume", "must", *limit])
    at_step(folder, stopped + 4, process)
    nodes.cut()
    begun = time.monotonic()
    code, output = end(process)
    assert code == 3, output
    assert time.monotonic() - begun < 60 * TIMEOUT_MINUTES + 20
    assert "rank 1 (node-2): no sign of life for" in output and "step" in output, output
    until(lambda: not nodes.processes(), 30, f"left behind: {nodes.processes()}")
    nodes.reconnect()

    # Each node by itself, from the last complete checkpoint.
    complete = latest(folder)
    assert stopped < complete
    by_hand = ["--no_ssh", *MASTER, "--node_rank"]
    further = ["--resume", "must", "--stop-after", str(complete + 2)]
    resumed = [nodes.launch([*by_hand, str(node), *words, *further], node) for node in (0, 1)]
    ends = [end(process) for process in resumed]
    assert [code for code, _ in ends] == [0, 0], ends
    assert not nodes.processes()
    assert losses(folder) == one_host.losses(complete + 2)


def test_torchrun_on_two_nodes(nodes: Nodes, one_host: OneHost, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["miras_tiny", *RUN, "--stop-after", "2", "--output-dir", str(folder)]
    started = [nodes.torchrun(words, node) for node in (0, 1)]
    ends = [end(process) for process in started]
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses(folder) == one_host.losses(2)
