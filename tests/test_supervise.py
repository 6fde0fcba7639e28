"""launch.sh while ranks run: signals go to the ranks themselves, exit codes come back. With a launcher of our own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

RANK = """
    import os, signal, sys, time
    how = sys.argv[-1]
    def stop(number, frame):
        open(f"{os.environ['RANK']}-{number}", "a").write("x")
        time.sleep(float(os.environ.get("SAVING", 0.3)))
        open(f"saved-{os.environ['RANK']}", "w")
        os._exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if how == "deaf" else stop)
    if how == "forking" and not os.fork():
        time.sleep(0.1)
    open(f"ready-{os.environ['RANK']}", "w")
    if how.isdigit():
        sys.exit(int(how))
    if how == "killed":
        os.kill(os.getpid(), 9)
    time.sleep(60)
"""
LAUNCHER = """
    import os, subprocess, sys, time
    words = [sys.executable, "-m", "pipeline", "--local_rank=0", "train", sys.argv[1]]
    ranks = [subprocess.Popen(words, env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
    open("launcher", "w").write(str(os.getpid()))
    while any(rank.poll() is None for rank in ranks):
        # As DeepSpeed does: the first failure decides.
        code = next((rank.returncode for rank in ranks if rank.returncode), None)
        if code:
            time.sleep(0.5)
            sys.exit(code)
        time.sleep(0.05)
    sys.exit(next((rank.returncode for rank in ranks if rank.returncode), 0))
"""
SUPERVISOR = """
    import os, sys
    import psutil
    from pipeline.launch import supervise
    from pipeline.launch.layout import Launch
    from pipeline.launch.request import split
    class Fake(Launch):
        def command(self):
            if "UNGUARDED" in os.environ:
                (guard,) = psutil.Process().children()
                guard.kill()
                while guard.status() != psutil.STATUS_ZOMBIE:
                    pass
            return [sys.executable, "launcher.py", sys.argv[1]]
    supervise.KILL_TIMEOUT = 1.0
    supervise.SAVE_TIMEOUT = float(os.environ.get("SAVE_TIMEOUT", 20))
    launcher = os.environ.get("LAUNCHER")
    sys.exit(supervise.supervise(Fake(split([]), (), {}, {"localhost": [0, 1]}, 0, launcher), os.environ))
"""


class Job:
    def __init__(self, folder: Path, how: str, **environment: str) -> None:
        self.folder = folder
        (folder / "fake" / "pipeline").mkdir(parents=True)
        (folder / "fake" / "pipeline" / "__init__.py").touch()
        (folder / "fake" / "pipeline" / "__main__.py").write_text(textwrap.dedent(RANK))
        launcher = textwrap.dedent(LAUNCHER).replace("import os, sub", "import os; os.chdir('fake')\nimport os, sub", 1)
        (folder / "launcher.py").write_text(launcher)
        (folder / "supervisor.py").write_text(textwrap.dedent(SUPERVISOR))
        self.process = subprocess.Popen(
            [sys.executable, "supervisor.py", how],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "RANK"}
            | {"PYTHONPATH": str(ROOT)}
            | environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 8
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def started(self) -> Job:
        self.until(lambda: all((self.folder / "fake" / f"ready-{rank}").exists() for rank in (0, 1)))
        return self

    def processes(self) -> list[psutil.Process]:
        """Everything that runs in this job's folder, the supervisor and its guard included."""
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()).is_relative_to(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        self.until(lambda: not self.processes())
        return self.process.returncode, errors

    def launcher(self) -> psutil.Process:
        return psutil.Process(int((self.folder / "fake" / "launcher").read_text()))

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "fake").glob("saved-*"))

    def told(self) -> dict[str, str]:
        """How often each rank got which signal."""
        return {path.name: path.read_text() for path in (self.folder / "fake").glob("[01]-*")}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made = []

    def make(how: str, **environment: str) -> Job:
        made.append(Job(tmp_path, how, **environment))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes():
            process.kill()


@pytest.mark.parametrize(("how", "code"), [("0", 0), ("2", 2), ("3", 3), ("killed", 3)])
def test_exit_codes_come_through(job: Callable[..., Job], how: str, code: int) -> None:
    assert job(how).end() == (code, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_rank_is_told_once_and_saves(job: Callable[..., Job], number: signal.Signals) -> None:
    one = job("waits").started()
    one.process.send_signal(number)
    code, errors = one.end()
    assert code == 128 + number
    assert one.told() == {f"{rank}-{number}": "x" for rank in (0, 1)}
    assert f"{number.name} is passed on to the ranks of this machine (2)" in errors


def test_what_a_rank_forks_is_its_own_business(job: Callable[..., Job]) -> None:
    one = job("forking").started()
    one.process.terminate()
    assert "passed on to the ranks of this machine (2)" in one.end()[1]


def test_a_closed_terminal_is_a_reason_to_save(job: Callable[..., Job]) -> None:
    one = job("waits").started()
    one.process.send_signal(signal.SIGHUP)
    assert one.end()[0] == 128 + signal.SIGTERM
    assert one.told() == {f"{rank}-{int(signal.SIGTERM)}": "x" for rank in (0, 1)}


def test_a_second_interrupt_ends_ranks_that_do_not_listen(job: Callable[..., Job]) -> None:
    one = job("deaf").started()
    one.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    one.process.send_signal(signal.SIGINT)  # the same key, held down
    time.sleep(1.2)
    assert one.process.poll() is None
    one.process.send_signal(signal.SIGINT)
    code, errors = one.end()
    assert code == 130 and "without a checkpoint" in errors


def test_ranks_save_when_the_supervisor_is_killed(job: Callable[..., Job]) -> None:
    one = job("waits").started()
    one.process.kill()
    one.end()
    assert one.told() == {f"{rank}-{int(signal.SIGTERM)}": "x" for rank in (0, 1)}


def test_ranks_do_not_outlive_their_launcher(job: Callable[..., Job]) -> None:
    one = job("waits").started()
    one.launcher().kill()
    code, errors = one.end()
    assert code == 3 and "2 of its ranks are not" in errors


def test_ranks_save_when_one_signal_reaches_every_process(job: Callable[..., Job]) -> None:
    one = job("waits", SAVING="2.5").started()
    for process in one.processes():
        process.terminate()
    code, errors = one.end()
    assert (code, one.saved()) == (143, ["saved-0", "saved-1"]), errors


def test_ranks_save_when_the_signal_reaches_the_launcher_first(job: Callable[..., Job]) -> None:
    one = job("waits", SAVING="2.5").started()
    one.launcher().terminate()
    code, errors = one.end()
    assert (code, one.saved()) == (143, ["saved-0", "saved-1"]), errors


def test_ranks_without_a_launcher_are_not_waited_for_without_end(job: Callable[..., Job]) -> None:
    one = job("deaf", SAVE_TIMEOUT="1").started()
    for process in one.processes():
        process.terminate()
    code, errors = one.end()
    assert code == 143 and "2 of its ranks are not" in errors


def test_a_second_interrupt_ends_ranks_that_have_no_launcher(job: Callable[..., Job]) -> None:
    one = job("deaf").started()
    for process in one.processes():
        process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert one.process.poll() is None
    begun = time.monotonic()
    one.process.send_signal(signal.SIGINT)
    code, errors = one.end()
    assert code == 130 and "without a checkpoint" in errors
    assert time.monotonic() - begun < 10  # SAVE_TIMEOUT is 20


@pytest.mark.parametrize("code", [0, 2])
def test_the_exit_code_survives_the_guard(job: Callable[..., Job], code: int) -> None:
    assert job(str(code), UNGUARDED="yes").end() == (code, "")


def test_the_exit_code_survives_who_reads_the_messages(job: Callable[..., Job]) -> None:
    one = job("waits").started()
    assert one.process.stderr is not None
    one.process.stderr.close()
    one.process.terminate()
    assert one.process.wait(timeout=30) == 143
    assert one.saved() == ["saved-0", "saved-1"]


@pytest.mark.parametrize(("answer", "code"), [(0, 3), (1, 0)])
def test_a_launch_over_pdsh_has_not_finished_while_its_ranks_run(
    job: Callable[..., Job], tmp_path: Path, answer: int, code: int
) -> None:
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(f'#!/bin/sh\necho "$@" >asked\nexit {answer}\n')  # 0: there were ranks, and they were told
    pdsh.chmod(0o755)
    one = job("0", LAUNCHER="pdsh", PATH=f"{pdsh.parent}:{os.environ['PATH']}")
    ended, errors = one.end()
    assert ended == code and ("the ranks of localhost are not" in errors) == bool(code), errors
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:3] == ["-S", "-w", "localhost"] and asked[-1] == str(int(signal.SIGTERM))
