"""What this machine has, found without loading torch where that is possible. Standard library only."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import importlib.util
import itertools
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.host.package import how_to_set_up


class LocalHost:
    """The devices, cores, ports and neighbours of this machine, as an environment sees them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    def gpus(self) -> int:
        """GPUs of this machine that torch can use; 0 when the ranks belong on the CPU."""
        wanted = self.environment.get("DS_ACCELERATOR")
        if wanted not in (None, "", "cpu", "cuda"):
            raise UserError(f"DS_ACCELERATOR is {wanted!r}: give cuda or cpu, or unset it")
        count = 0 if wanted == "cpu" else self._count_gpus()
        if count and self.visible_gpus(count) == []:
            count = 0
        if wanted == "cuda" and not count:
            raise UserError("DS_ACCELERATOR is cuda, but torch sees no GPU here: unset it to run on the CPU")
        return count

    def visible_gpus(self, count: int) -> list[int] | None:
        """Which of `count` GPUs CUDA_VISIBLE_DEVICES leaves over; None when it is not set."""
        text = self.environment.get("CUDA_VISIBLE_DEVICES")
        if text is None:
            return None
        words = [word.strip() for word in text.split(",")]
        if any(word.startswith(("GPU-", "MIG-")) for word in words):
            raise UserError(
                "CUDA_VISIBLE_DEVICES names GPUs by UUID, which DeepSpeed's launcher cannot read: give their numbers"
            )
        # CUDA stops at the first entry that is not a device.
        return [int(word) for word in itertools.takewhile(lambda w: w.isdecimal() and int(w) < count, words)]

    def _count_gpus(self) -> int:
        version = _torch_version_file()
        # A build for the CPU alone says so in a file: no need to load it.
        if version is None or not re.search(r"^(cuda|hip)\b[^=]*= *['\"]", version.read_text(), re.MULTILINE):
            return 0
        environment = {k: v for k, v in self.environment.items() if k != "CUDA_VISIBLE_DEVICES"}
        script = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        if answer.returncode:
            last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"torch does not load ({last}): {how_to_set_up()}, and see `mnemos doctor`")
        return int(answer.stdout.split()[-1])

    def idle_gpus(self) -> bool:
        """Whether an NVIDIA driver shows GPUs here that nobody asked to leave alone."""
        hidden = self.environment.get("DS_ACCELERATOR") == "cpu" or "CUDA_VISIBLE_DEVICES" in self.environment
        folder = Path("/proc/driver/nvidia/gpus")
        return not hidden and folder.is_dir() and any(folder.iterdir())

    def cores(self) -> int:
        """Cores this process may use: a container may be given a share of the machine."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
            return min(cores, max(1, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError):  # no such file, or "max"
            return cores

    def has_command(self, name: str) -> bool:
        return shutil.which(name, path=self.environment.get("PATH")) is not None

    def is_local(self, host: str) -> bool:
        """Whether a host name means this machine: only a machine's own addresses can be bound."""
        if host in ("localhost", socket.gethostname()):
            return True
        try:
            addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return any(_binds(family, (str(address[0]), 0)) is None for family, _, _, _, address in addresses)

    def port_problem(self, port: int) -> str | None:
        """Why a rendezvous cannot listen on a port, or None when it can."""
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            error = _binds(family, (address, port))
            if error is not None and error.errno in (errno.EADDRINUSE, errno.EACCES):
                return os.strerror(error.errno).lower()
        return None

    def free_port(self) -> int:
        """A port that nothing listens on, and that no connection is given before rank 0 has loaded torch and listens:
        one below those that systems choose from by themselves (32768 on Linux, 49152 elsewhere)."""
        for _ in range(100):
            port = random.SystemRandom().randrange(16384, 32768)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
        raise UserError("100 ports between 16384 and 32767 are all in use: give --master_port")

    def unreachable(self, hosts: Sequence[str], ssh_port: int | None) -> list[str]:
        """The hosts that ssh cannot log in to without a password."""
        port = ["-p", str(ssh_port)] if ssh_port else []
        own = self.environment.get("PDSH_SSH_ARGS_APPEND", "").split()

        def fails(host: str) -> bool:
            command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *own, *port, host, "hostname"]
            try:
                return (
                    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0
                )
            except OSError:  # no ssh here
                return True

        with concurrent.futures.ThreadPoolExecutor(max_workers=64) as pool:
            return [host for host, failed in zip(hosts, pool.map(fails, hosts), strict=True) if failed]


def _torch_version_file() -> Path | None:
    """torch/version.py, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "version.py"
    return path if path.is_file() else None


def _binds(family: int, address: tuple[str, int]) -> OSError | None:
    """None when a socket can be bound to the address, else why it cannot."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the rendezvous does: connections of an earlier run that are still closing are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
