"""Lays the ranks out and checks that they can start."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.host.local import LocalHost
from pipeline.launch.hosts import parse_filter, read_hostfile, select
from pipeline.launch.remote import PDSH_SSH_ARGS, check_plain, exports, quoted, secrets, ssh_options
from pipeline.launch.request import CPU_RANKS, DEFAULT_PORT, MULTI_NODE_COMMANDS, Request

NUMBERLESS = ("mvapich", "openmpi", "slurm")
"""Launchers of DeepSpeed 0.19.8 that start ranks without RANK in their environment."""


@dataclass(frozen=True)
class Launch:
    """A checked launch: what to run, in which environment (None: without that variable), and on which slots."""

    request: Request
    flags: tuple[str, ...]
    environment: dict[str, str | None]
    hosts: dict[str, list[int]] = field(repr=False)
    gpus: int
    """GPUs that a rank can use on this machine; 0: the ranks run on the CPU."""
    launcher: str | None = None
    """What starts the ranks of several nodes; None: this node's are started here."""
    exports: dict[str, str] = field(default_factory=dict, repr=False)
    """Environment variables for the nodes, when there is a launcher."""

    @property
    def ranks(self) -> int:
        return sum(len(slots) for slots in self.hosts.values())

    def check_command(self) -> list[str]:
        layout = {"ranks": self.ranks, "nodes": len(self.hosts), "gpus-per-node": self.gpus}
        flags = [word for name, value in layout.items() for word in (f"--launch-{name}", str(value))]
        return [sys.executable, "-m", "pipeline", "check", *self.request.run, *flags]

    def command(self) -> list[str]:
        script = Path(sys.executable).with_name("deepspeed")
        # A DeepSpeed that came with the machine has no script in this environment.
        launcher = [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
        run = [quoted(word) for word in self.request.run] if self.launcher == "pdsh" else self.request.run
        return [*launcher, *self.flags, "--module", "pipeline", "train", *run]

    def warnings(self) -> list[str]:
        """What is allowed, but should be known."""
        return [
            f"{name} is passed on to the nodes, on command lines that everybody there can read: keep it in a file"
            " that only you can read (docs/multi_node.md)"
            for name in secrets(self.exports)
        ]


def lay_out(request: Request, machine: LocalHost) -> Launch:
    """Lays the ranks out and checks that they can start. Raises UserError."""
    gpus = machine.gpus()
    environment: dict[str, str | None] = {}
    launcher: str | None = None
    if gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    if "--bind_cores_to_rank" in request.launcher and not machine.has_command("numactl"):
        raise UserError("--bind_cores_to_rank: numactl is not installed: install it, or leave the flag out")

    flags = {flag: value for flag, value in request.launcher.items() if flag != "--module"}
    if "--hostfile" in request.launcher:
        hosts, launcher = _lay_out_hosts(request, machine, gpus, flags)
    else:
        hosts = _lay_out_local(request, machine, gpus, flags, environment)
    if "--quiet" not in flags:
        flags.setdefault("--log_level", "error")  # its INFO lines would bury the run's own
    if "OMP_NUM_THREADS" not in machine.environment:
        ranks = max(len(slots) for slots in hosts.values())
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cores() // ranks))
    words = tuple(flag if value is None else f"{flag}={value}" for flag, value in flags.items())
    variables: dict[str, str] = {}
    if launcher is not None:
        # What was decided for this machine's devices and cores holds for the nodes when it is one of them.
        own = any(machine.is_local(host) for host in hosts)
        decided = {name: value for name, value in environment.items() if value is not None and own}
        variables = exports({**machine.environment, **decided}, launcher)
        environment["PDSH_SSH_ARGS_APPEND"] = ssh_options(machine.environment)
        environment["PDSH_SSH_ARGS"] = machine.environment.get("PDSH_SSH_ARGS", PDSH_SSH_ARGS)
    return Launch(request, words, environment, hosts, gpus, launcher, variables)


def _lay_out_local(
    request: Request, machine: LocalHost, gpus: int, flags: dict[str, str | None], environment: dict[str, str | None]
) -> dict[str, list[int]]:
    """Ranks on this machine; completes `flags` and `environment`."""
    if request.number("--node_rank"):
        raise UserError(f"--node_rank is {request.text('--node_rank')}, but there is one node: name a --hostfile")
    if "--force_multi" in flags:
        raise UserError("--force_multi: there is one node, this one: name a --hostfile")
    # DeepSpeed would run on the hosts of /job/hostfile if this machine had one, which nobody named.
    flags["--hostfile"] = "/dev/null"
    if "--no_ssh" in flags:
        flags.setdefault("--node_rank", "0")
    visible = machine.visible_gpus(gpus) if gpus else None
    if gpus:
        hosts = _local_gpus(request, gpus, visible)
        if visible is not None and "--include" not in flags and "--exclude" not in flags:
            # With any other flag DeepSpeed ignores CUDA_VISIBLE_DEVICES and takes the first GPUs of the machine.
            flags.pop("--num_gpus", None)
            flags.pop("--num_nodes", None)
            flags["--include"] = "localhost:" + ",".join(map(str, hosts["localhost"]))
    else:
        # DeepSpeed counts LOCAL_SIZE devices on a CPU, or else NUMA nodes, which are not how many ranks are wanted.
        named = parse_filter("--include", request.text("--include")) if "--include" in flags else {}
        slots = max(request.number("--num_gpus") or CPU_RANKS, *(slot + 1 for slot in named.get("localhost", [0])))
        hosts = select({"localhost": slots}, request, "CPU ranks")
        environment["LOCAL_SIZE"] = str(slots)
        if "--include" not in flags and "--exclude" not in flags:
            flags["--num_gpus"] = str(len(hosts["localhost"]))
    environment["CUDA_VISIBLE_DEVICES"] = None  # decided: it would be taken into account a second time
    _settle_port(request, machine, flags)
    return hosts


def _local_gpus(request: Request, gpus: int, visible: list[int] | None) -> dict[str, list[int]]:
    if visible is None or "--include" in request.launcher or "--exclude" in request.launcher:
        return select({"localhost": gpus}, request, "GPUs")
    slots = select({"localhost": len(visible)}, request, "visible GPUs (CUDA_VISIBLE_DEVICES)")["localhost"]
    return {"localhost": [visible[slot] for slot in slots]}


def _lay_out_hosts(
    request: Request, machine: LocalHost, gpus: int, flags: dict[str, str | None]
) -> tuple[dict[str, list[int]], str | None]:
    """Ranks on the hosts of a hostfile, and what starts them if they are several; completes `flags`."""
    path = request.text("--hostfile")
    pool = read_hostfile(path)
    hosts = select(pool, request, f"slots in {path}")
    local = [host for host in hosts if machine.is_local(host)]
    for host in local:
        if gpus and max(hosts[host]) >= gpus:
            raise UserError(f"--hostfile {path}: {host} has {pool[host]} slots but {gpus} GPUs: correct its slots")
    first = next(iter(hosts))
    if "--no_ssh" in flags:
        rank = request.number("--node_rank")
        if rank is None or rank >= len(hosts):
            raise UserError(f"--no_ssh: give --node_rank, this node's place among the {len(hosts)} hosts (from 0 on)")
        if "--master_addr" not in flags:
            if first not in local:
                raise UserError(f"--no_ssh: give --master_addr, the address of {first}")
            if len(hosts) > 1:
                raise UserError(f"--no_ssh: give --master_addr, the address of {first} that the other hosts reach")
            flags["--master_addr"] = "127.0.0.1"
        if rank == 0:
            _check_port(request, machine)
        return hosts, None
    if len(hosts) == 1 and local and "--force_multi" not in flags:
        # One host, this one: nothing to reach by ssh.
        flags["--no_ssh_check"] = None
        flags.setdefault("--master_addr", "127.0.0.1")
        _settle_port(request, machine, flags)
        return hosts, None
    # Without it DeepSpeed starts the ranks of a single remote host on this machine.
    flags["--force_multi"] = None
    if first in local:
        _check_port(request, machine)
    launcher = (request.text("--launcher") or "pdsh").lower()
    by_hand = "start every node by itself with --no_ssh --node_rank N --master_addr HOST"
    if launcher in NUMBERLESS:
        raise UserError(
            f"--launcher {launcher}: DeepSpeed tells its ranks no numbers, so each would be a run by itself:"
            " use pdsh, or start torchrun on every node (docs/multi_node.md)"
        )
    command = MULTI_NODE_COMMANDS[launcher]
    if not machine.has_command(command):
        raise UserError(f"--launcher {launcher}: {command} is not installed: install it, or {by_hand}")
    for flag in ("--include", "--exclude", "--num_nodes", "--num_gpus"):
        if flag in flags and launcher in ("mpich", "impi"):
            raise UserError(f"--launcher {launcher} does not go with {flag}: name the slots in {path} instead")
    if launcher == "pdsh":
        check_plain("the current folder", os.getcwd(), "start from another one")
        check_plain("this Python", sys.executable, "set the project up in another folder")
        for flag in ("--venv_script", "--enable_each_rank_log"):
            check_plain(flag, request.text(flag), "give another path")
    if "--no_ssh_check" not in flags:
        unreachable = machine.unreachable(list(hosts), request.number("--ssh_port"))
        if unreachable:
            raise UserError(
                f"--hostfile {path}: no ssh without a password to {', '.join(unreachable)}: set up keys, or {by_hand}"
            )
    # Done here, for every host, and with the options that pdsh gives to ssh.
    flags["--no_ssh_check"] = None
    return hosts, launcher


def _settle_port(request: Request, machine: LocalHost, flags: dict[str, str | None]) -> None:
    """The rendezvous port of a single node: the one that was asked for, or any free one.

    Not the same one every time: two runs that start together on one machine must not meet.
    """
    if "--master_port" in flags:
        _check_port(request, machine)
    else:
        flags["--master_port"] = str(machine.free_port())


def _check_port(request: Request, machine: LocalHost) -> None:
    port = request.number("--master_port") or DEFAULT_PORT
    problem = machine.port_problem(port)
    if problem:
        raise UserError(f"--master_port: port {port} cannot be used on this machine ({problem}): give another one")
