"""The rank processes of one launch on this machine, wherever they hang: under the launcher, or under sshd.

python -m pipeline.launch.ranks MARK SIGNAL      sends a signal to them; exit code 1 when there are none
"""

from __future__ import annotations

import contextlib
import sys

import psutil

MARK = "MNEMOS_LAUNCH"
"""The environment variable that distinguishes the ranks of one launch from those of another."""


def ranks(mark: str) -> list[psutil.Process]:
    """The ranks of the launch with this mark, but not what they started themselves."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        # Gone meanwhile, a zombie, or somebody else's.
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words_of_rank(words) and process.environ().get(MARK) == mark:
                found[process.pid] = process
    kept = []
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            # What a rank forks has its command line.
            if process.ppid() not in found and process.status() != psutil.STATUS_ZOMBIE:
                kept.append(process)
    return kept


def words_of_rank(words: list[str]) -> bool:
    """Whether a command line is `python [-u] -m pipeline train ...`, or the same with --local_rank before `train`."""
    if "-m" not in words:
        return False
    after = [word for word in words[words.index("-m") + 1 :] if not word.startswith("--local_rank")]
    return after[:2] == ["pipeline", "train"]


def send(mark: str, number: int) -> list[psutil.Process]:
    """Sends a signal to the ranks of a launch; returns those that there were."""
    sent = []
    for process in ranks(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            sent.append(process)
    return sent


if __name__ == "__main__":
    sys.exit(0 if send(sys.argv[1], int(sys.argv[2])) else 1)
