"""Two nodes on one machine: network namespaces joined by a cable; each has its own host name, processes and sshd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.launch.harness import ROOT, environment

INTERFACE = "mn0"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
COMMANDS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter")
OWN = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Of `unshare`: what a node does not share with its neighbour, besides the network."""
SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
ClientAliveInterval 2
ClientAliveCountMax 3
LogLevel ERROR
"""


def missing() -> str | None:
    """Why two nodes cannot be made here, or None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in COMMANDS if which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: openssh-server openssh-client pdsh iproute2)"
    probe = f"mnemos-probe-{os.getpid()}"
    cable = ["type", "veth", "peer", "name", "mn1", "netns", probe]
    trials = (
        ["ip", "netns", "add", probe],
        ["ip", "link", "add", "mn0", "netns", probe, *cable],
        ["ip", "netns", "exec", probe, "unshare", *OWN, "hostname", "probe"],
    )
    try:
        for trial in trials:
            if subprocess.run(trial, capture_output=True).returncode:
                return f"this machine does not allow `{' '.join(trial)}`"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return None


def which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Nodes:
    """Nodes 0 and 1. Use `two_nodes`, which takes them down again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spaces = tuple(f"mnemos-{os.getpid()}-{index}" for index in (1, 2))
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for space in self.spaces:
            run("ip", "netns", "add", space)
        one, other = self.spaces
        run("ip", "link", "add", INTERFACE, "netns", one, "type", "veth", "peer", "name", INTERFACE, "netns", other)
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            run("ip", "-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                run("ip", "-n", space, "link", "set", link, "up")
        for key in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        for node in (0, 1):
            sshd = f"{which('sshd')} -D -e -f {self.folder}/sshd_config"
            # Process 1 of the node: when it ends, everything on the node does.
            words = ["unshare", *OWN, "sh", "-c", f"hostname node-{node + 1}; exec {sshd}"]
            self.daemons.append(subprocess.Popen(["ip", "netns", "exec", self.spaces[node], *words]))
            until(lambda: len(self.inits()) > node, 20, "a node does not start")  # noqa: B023
        until(lambda: all(self.answers(node) for node in (0, 1)), 20, "sshd does not answer")

    def answers(self, node: int) -> bool:
        words = ["ssh", *self.ssh_options().split(), ADDRESSES[node], "true"]
        return subprocess.run(self.command(0, words), capture_output=True).returncode == 0

    def ssh_options(self) -> str:
        return (
            f"-i {self.folder}/user_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"
            " -o LogLevel=ERROR -o ServerAliveInterval=2 -o ServerAliveCountMax=3"
        )

    def command(self, node: int, words: Sequence[str]) -> list[str]:
        """A command on a node."""
        spaces = ["--net", "--uts", "--pid", "--mount"]
        return ["nsenter", "--target", str(self.inits()[node]), *spaces, f"--wd={ROOT}", *words]

    def inits(self) -> list[int]:
        """The first process of every node that has one, as numbered here."""
        found = [psutil.Process(daemon.pid).children() for daemon in self.daemons]
        return [children[0].pid for children in found if children]

    def launch(self, words: Sequence[str], node: int = 0) -> subprocess.Popen[str]:
        """Starts `launch.sh WORDS` on a node, as a user there would."""
        settings = {**environment(), "GLOO_SOCKET_IFNAME": INTERFACE, "PDSH_SSH_ARGS_APPEND": self.ssh_options()}
        command = self.command(node, ["./launch.sh", "--hostfile", str(self.hostfile), *words])
        return self.popen(command, settings)

    def torchrun(self, words: Sequence[str], node: int) -> subprocess.Popen[str]:
        flags = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr", ADDRESSES[0]]
        command = [str(Path(sys.executable).parent / "torchrun"), *flags, "-m", "pipeline", "train", *words]
        return self.popen(self.command(node, command), {**environment(), "GLOO_SOCKET_IFNAME": INTERFACE})

    @staticmethod
    def popen(command: Sequence[str], settings: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    @staticmethod
    def signal(process: subprocess.Popen[str], number: int) -> None:
        """Sends a signal to a command on a node; what was started here only waits for it."""
        (command,) = psutil.Process(process.pid).children()
        command.send_signal(number)

    def cut(self) -> None:
        """Pulls the cable: nothing arrives, and nobody is told."""
        run("ip", "-n", self.spaces[1], "link", "set", INTERFACE, "down")

    def reconnect(self) -> None:
        run("ip", "-n", self.spaces[1], "link", "set", INTERFACE, "up")
        until(lambda: self.answers(1), 20, "the second node does not come back")

    def processes(self) -> dict[int, str]:
        """Command lines by process id on both nodes, without those of sshd and of what is dead."""
        found = {}
        for space in self.spaces:
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True)
            for pid in map(int, listed.stdout.split()):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if words and "sshd" not in words:
                        found[pid] = words
        return found

    def stop(self) -> None:
        """Takes everything down, whatever state it is in."""
        for space in self.spaces:
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in map(int, listed.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for space in self.spaces:
            # The cable goes with its ends.
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def until(condition, seconds: float, problem: str) -> None:
    """Waits for a condition; fails with `problem`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, problem
        time.sleep(0.1)
