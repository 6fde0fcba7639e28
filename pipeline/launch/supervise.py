"""Stays while the launcher runs: passes signals to the ranks themselves, and the exit code on.

DeepSpeed's `deepspeed` command forgets its ranks when it is ended, and its per-node launcher ends them one after the
other, with SIGKILL after 30 seconds. Here each rank of this machine gets the signal once;
all stop at the same step, save and exit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

import psutil

from pipeline.errors import LOST_RANK
from pipeline.launch.layout import Launch
from pipeline.launch.ranks import MARK, ranks, send
from pipeline.launch.remote import environment_file

REPEAT_TIMEOUT = 1.0
"""Seconds after which another Ctrl-C means that the person will not wait for the checkpoint."""
KILL_TIMEOUT = 5.0
"""Seconds between SIGTERM and SIGKILL for a launcher that must end now."""
SAVE_TIMEOUT = 30.0
"""Seconds for ranks that are saving when their launcher has ended: as many as DeepSpeed's own gives them."""
REMOTE_SIGNAL_TIMEOUT = 30.0
"""Seconds in which another node must have passed a signal on."""


def supervise(launch: Launch, environment: Mapping[str, str]) -> int:
    """Runs a launch to its end; returns the exit code of `launch.sh`."""
    mark = secrets.token_hex(8)
    environment = {**environment, MARK: mark}
    with tempfile.TemporaryDirectory(prefix="mnemos-launch-") as folder:
        if launch.launcher is not None:
            path = os.path.join(folder, "environment")
            with open(path, "w", encoding="utf-8") as file:
                file.write(environment_file({**launch.exports, MARK: mark}, launch.launcher))
            environment["DS_ENV_FILE"] = path
        supervisor = Supervisor(launch, environment, mark)
        return supervisor.run()


class Supervisor:
    """One launcher, in a session of its own so that the terminal's Ctrl-C reaches this process alone."""

    def __init__(self, launch: Launch, environment: Mapping[str, str], mark: str) -> None:
        self.launch, self.environment, self.mark = launch, environment, mark
        self.process: subprocess.Popen[bytes] | None = None
        self.signalled: int | None = None
        self.since = 0.0
        self.reached: list[psutil.Process] = []
        self.ending = False

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup's choice stays.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
        with _guard(self.mark) as send_line:
            self.process = subprocess.Popen(
                self.launch.command(), env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            send_line(self.process.pid)
            if self.signalled is not None:  # while it was being started
                self._pass_on(self.signalled)
            ended = self.process.wait()
            code = self._code(ended)
            if ended == -signal.SIGTERM and self.signalled is None and ranks(self.mark):
                # A signal to every process need not come here first.
                self._note(signal.SIGTERM, None)
            if self.signalled is not None and self._saving():
                code = 128 + self.signalled  # the launcher has not waited for theirs
                self._let_save()
            left = ranks(self.mark)
            if left:
                _log(f"the launcher is gone, {len(left)} of its ranks are not: they are ended too")
                self._end()
                code = code or LOST_RANK
            elif code == 0 and self.launch.launcher == "pdsh" and self._pass_on_to_a_node(signal.SIGTERM):
                # DeepSpeed reports a pdsh that was killed as one that finished; the nodes' ranks do not end with it.
                _log(f"the launcher is gone, the ranks of {next(iter(self.launch.hosts))} are not: all save and leave")
                code = LOST_RANK
        return code

    def _let_save(self) -> None:
        """Waits, for up to SAVE_TIMEOUT seconds, for ranks that got the signal and whose launcher has not waited.

        DeepSpeed's command dies of a SIGTERM at once, and systemd, Slurm and `pkill -f` send it to every process.
        """
        end = time.monotonic() + SAVE_TIMEOUT
        while not self.ending and time.monotonic() < end and self._saving():
            time.sleep(0.2)

    def _saving(self) -> bool:
        # Processes that a rank forked and left behind got no signal and save nothing.
        return any(process in self.reached for process in ranks(self.mark))

    def _code(self, code: int) -> int:
        if self.ending and self.signalled is not None:
            return 128 + self.signalled
        if code == 255 and self.launch.launcher == "pdsh":
            return LOST_RANK  # ssh's own: the connection to a node broke
        # DeepSpeed's launcher exits with -N, which is 256 - N to a shell, for a rank that signal N ended.
        number = -code if code < 0 else 256 - code if code > 255 - signal.NSIG else 0
        if number == signal.SIGKILL:
            return LOST_RANK  # the launcher saw it before the other ranks, which would exit with the same code
        return 128 + number if number else code

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signalled is None:
            # A closed terminal asks for what a scheduler asks for.
            self.signalled, self.since = signal.SIGTERM if number == signal.SIGHUP else number, time.monotonic()
            if self.process is not None:
                self._pass_on(self.signalled)
        elif number == signal.SIGINT and time.monotonic() - self.since >= REPEAT_TIMEOUT and not self.ending:
            _log("interrupted again: the ranks are ended without a checkpoint")
            self.ending = True
            threading.Thread(target=self._end, daemon=True).start()

    def _pass_on(self, number: int) -> None:
        name = signal.Signals(number).name
        self.reached = send(self.mark, number)
        if not self.reached and self.launch.launcher == "pdsh" and self._pass_on_to_a_node(number):
            _log(f"{name} is passed on to the ranks of {next(iter(self.launch.hosts))}: all save and leave")
        elif self.reached:
            again = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
            _log(f"{name} is passed on to the ranks of this machine ({len(self.reached)}): they save and leave{again}")
        elif self.launch.launcher is not None and self.process is not None:
            # No rank can be found from here: the launcher has their addresses.
            self.ending = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        else:
            _log(f"{name} before a rank has started: nothing is left to save")
            self.ending = True
            threading.Thread(target=self._end, daemon=True).start()

    def _pass_on_to_a_node(self, number: int) -> bool:
        """A signal to one rank is enough. DeepSpeed would end every launch of the user's on the nodes."""
        host = next(iter(self.launch.hosts))
        port = self.launch.request.number("--ssh_port")
        options = self.environment.get("PDSH_SSH_ARGS_APPEND", "") + (f" -p {port}" if port else "")
        environment = {**self.environment, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}
        # Python 3.10 writes a member of signal.Signals by its name.
        words = [sys.executable, "-m", "pipeline.launch.ranks", self.mark, str(int(number))]
        # The node's shell starts in another folder.
        command = ["pdsh", "-S", "-w", host, f"cd {os.getcwd()};", *words]
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=REMOTE_SIGNAL_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def _end(self) -> None:
        assert self.process is not None
        end_group(self.process.pid, self.mark)


def end_group(group: int, mark: str) -> None:
    """Ends a launcher and its ranks: SIGTERM, and SIGKILL to what is left after KILL_TIMEOUT seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
    send(mark, signal.SIGTERM)
    end = time.monotonic() + KILL_TIMEOUT
    while time.monotonic() < end and (ranks(mark) or _exists(group)):
        time.sleep(0.1)
    send(mark, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def _guard(mark: str) -> Iterator[Callable[[int], None]]:
    """A second process that signals the ranks to save and exit when this one dies without notice, as by SIGKILL."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(writer)
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            _watch_supervisor(reader, mark)
            code = 0
        finally:
            os._exit(code)
    os.close(reader)

    def send_line(word: int | str) -> None:
        # A guard that is gone guards no longer; the run and its exit code are none the worse for it.
        with contextlib.suppress(BrokenPipeError):
            os.write(writer, f"{word}\n".encode())

    try:
        yield send_line
        send_line("done")
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def _watch_supervisor(reader: int, mark: str) -> None:
    with os.fdopen(reader, "rb") as pipe:
        lines = pipe.read().split()
    if not lines or lines[-1] == b"done":
        return
    if not send(mark, signal.SIGTERM):
        end_group(int(lines[0]), mark)


def _log(text: str) -> None:
    # Whoever reads it may have gone with the terminal, or by the same Ctrl-C: the exit code still counts.
    with contextlib.suppress(OSError):
        os.write(2, f"launch.sh: {text}\n".encode())
