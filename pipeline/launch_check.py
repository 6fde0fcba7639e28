"""`./launch.sh [launcher flags] [RECIPE] [recipe flags]` as a DeepSpeed launch, or one line that says what to mend.

DeepSpeed's launcher answers a bad hostfile or a busy port with a traceback, and starts more ranks than there are GPUs.
So the flags are split and checked here, and the recipe by `mnemos check`, before a rank exists or a file is written.
Standard library only: this runs before every launch.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError
from pipeline.machine import Machine

DEFAULT_RECIPE = "miras_tiny"
DEFAULT_PORT = 29500
CPU_RANKS = 2

# The flags of `deepspeed --help` (0.19.8); tests/test_launch_check.py compares them with the installed version.
VALUE_FLAGS = frozenset(
    "--hostfile --include --exclude --num_nodes --num_gpus --master_port --master_addr --node_rank --launcher"
    " --launcher_args --autotuning --enable_each_rank_log --bind_core_list --ssh_port --venv_script --log_level".split()
)
SWITCHES = frozenset(
    "--module --no_python --no_local_rank --no_ssh --no_ssh_check --force_multi --save_pid --bind_cores_to_rank"
    " --quiet".split()
)
ALIASES = {
    "-H": "--hostfile",
    "-i": "--include",
    "-e": "--exclude",
    "-q": "--quiet",
    "--num_accelerators": "--num_gpus",
}
NUMBERS = {"--num_nodes": 1, "--num_gpus": 1, "--master_port": 1, "--node_rank": 0, "--ssh_port": 1}
"""Launcher flags that take a whole number, and the least one."""

MULTI_NODE_COMMANDS = {
    "pdsh": "pdsh",
    "openmpi": "ompi_info",
    "mpich": "mpirun",
    "impi": "mpirun",
    "mvapich": "mpiname",
    "slurm": "sinfo",
}
"""The command that each `--launcher` of DeepSpeed looks for."""

HOST_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})\s*(#.*)?")


@dataclass(frozen=True)
class Request:
    """What was typed. Launcher flags are under their long names; a switch has the value None."""

    launcher: dict[str, str | None]
    recipe: str | None
    """None when an archived `--config` names it."""
    recipe_flags: tuple[str, ...]

    @property
    def run(self) -> list[str]:
        return [*([] if self.recipe is None else [self.recipe]), *self.recipe_flags]

    def text(self, flag: str) -> str:
        return self.launcher.get(flag) or ""

    def number(self, flag: str) -> int | None:
        return int(self.text(flag)) if flag in self.launcher else None


@dataclass(frozen=True)
class Launch:
    """A checked launch: what to run, in which environment (None: without that variable), and on which slots."""

    request: Request
    flags: tuple[str, ...]
    environment: dict[str, str | None]
    hosts: dict[str, list[int]] = field(repr=False)
    gpus: int
    """GPUs that a rank can use on this machine; 0: the ranks run on the CPU."""

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
        return [*launcher, *self.flags, "--module", "pipeline", "train", *self.request.run]


def split(words: Sequence[str]) -> Request:
    """Splits launcher flags, RECIPE and recipe flags. Raises UserError for a launcher flag that is wrong by itself."""
    launcher: dict[str, str | None] = {}
    rest = list(words)
    while rest:
        typed, given, value = rest[0].partition("=")
        flag = ALIASES.get(typed, typed)
        if flag in VALUE_FLAGS:
            del rest[0]
            if not given:
                if not rest or _is_launcher_flag(rest[0]):
                    raise UserError(f"{typed} has no value: give one")
                value = rest.pop(0)
            launcher[flag] = value
        elif flag in SWITCHES and not given:
            del rest[0]
            launcher[flag] = None
        else:
            break
    recipe: str | None = DEFAULT_RECIPE
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    elif rest:
        _reject_misspelt(rest[0])
        if any(word.partition("=")[0] == "--config" for word in rest):
            recipe = None
    for word in rest:
        if _is_launcher_flag(word):
            raise UserError(f"{word.partition('=')[0]} is a launcher flag: put it before the recipe")
    _check_values(launcher)
    return Request(launcher, recipe, tuple(rest))


def _is_launcher_flag(word: str) -> bool:
    name = word.partition("=")[0]
    return len(name) > 2 and ALIASES.get(name, name) in VALUE_FLAGS | SWITCHES


def _reject_misspelt(word: str) -> None:
    name = word.partition("=")[0]
    known = {flag.replace("-", "_"): flag for flag in (*VALUE_FLAGS, *SWITCHES)}
    match = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.9)
    if match:
        raise UserError(f"{name} is not a launcher flag: did you mean {known[match[0]]}?")


def _check_values(launcher: Mapping[str, str | None]) -> None:
    for flag, least in NUMBERS.items():
        value = launcher.get(flag)
        if value is not None and not (re.fullmatch("[0-9]{1,9}", value) and int(value) >= least):
            raise UserError(f"{flag} is {value!r}: give a whole number from {least} on")
    for flag in ("--master_port", "--ssh_port"):
        if int(launcher.get(flag) or 1) > 65535:
            raise UserError(f"{flag} is {launcher[flag]}: ports end at 65535")
    if "--include" in launcher and "--exclude" in launcher:
        raise UserError("--include and --exclude are both given: keep one")
    for flag in ("--include", "--exclude"):
        for other in ("--num_gpus", "--num_nodes"):
            if flag in launcher and other in launcher:
                raise UserError(f"{flag} and {other} are both given: keep one")
    if "--no_python" in launcher or "--autotuning" in launcher:
        flag = "--no_python" if "--no_python" in launcher else "--autotuning"
        raise UserError(f"{flag} does not go with a recipe: leave it out")
    name = launcher.get("--launcher")
    if name is not None and name.lower() not in MULTI_NODE_COMMANDS:
        raise UserError(f"--launcher is {name!r}: give one of {', '.join(MULTI_NODE_COMMANDS)}")
    address = launcher.get("--master_addr")
    if address is not None and not re.fullmatch(r"[A-Za-z0-9._:][A-Za-z0-9._:-]*", address):
        raise UserError(f"--master_addr is {address!r}: give a host name or an IP address")
    levels = ("debug", "info", "warning", "error", "critical")
    if launcher.get("--log_level", "info") not in levels:
        raise UserError(f"--log_level is {launcher['--log_level']!r}: give one of {', '.join(levels)}")


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, in the order of the file. Raises UserError that names the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--hostfile {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--hostfile {path}: cannot be read ({reason}): give a file of `HOST slots=N` lines") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = HOSTFILE_LINE.fullmatch(line)
        if not match:
            raise UserError(f"--hostfile {path}, line {number}: {line!r} is not `HOST slots=N`")
        host, slots = match[1], int(match[2])
        # Host names end up in ssh and shell commands: one that starts with a hyphen would be an option there.
        if not HOST_NAME.fullmatch(host):
            raise UserError(f"--hostfile {path}, line {number}: {host!r} is not a host name")
        if slots < 1:
            raise UserError(
                f"--hostfile {path}, line {number}: {host} has no slots: give at least 1, or delete the line"
            )
        if host in hosts:
            raise UserError(f"--hostfile {path}, line {number}: {host} is named twice: keep one line")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host: add `HOST slots=N` lines")
    return hosts


def parse_filter(flag: str, text: str) -> dict[str, list[int]]:
    """Slots by host of `--include` or `--exclude` (HOST[:SLOT[,SLOT ...]][@HOST ...]); no slots: all of them."""
    chosen: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        if not HOST_NAME.fullmatch(host) or (colon and not re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})*", slots)):
            raise UserError(f"{flag} {text}: {part!r} is not HOST or HOST:SLOT,SLOT")
        known = chosen.setdefault(host, [])
        known += [int(slot) for slot in slots.split(",") if colon and int(slot) not in known]
    return chosen


def select(pool: Mapping[str, int], request: Request, what: str) -> dict[str, list[int]]:
    """The slots of every host that the flags choose, as DeepSpeed does, but never more than there are.

    `what` ends "host has 4 ...".
    """
    hosts = {host: list(range(slots)) for host, slots in pool.items()}
    flag = "--include" if "--include" in request.launcher else "--exclude"
    if flag in request.launcher:
        chosen = parse_filter(flag, request.text(flag))
        for host, slots in chosen.items():
            if host not in hosts:
                raise UserError(f"{flag} {request.text(flag)}: {host} is not one of {', '.join(hosts)}")
            for slot in slots:
                if slot >= pool[host]:
                    raise UserError(f"{flag} {request.text(flag)}: no slot {slot}: {host} has {pool[host]} {what}")
        if flag == "--include":
            hosts = {host: sorted(chosen[host]) or hosts[host] for host in hosts if host in chosen}
        else:
            dropped = {host: slots or hosts[host] for host, slots in chosen.items()}
            hosts = {host: [slot for slot in hosts[host] if slot not in dropped.get(host, [])] for host in hosts}
            hosts = {host: slots for host, slots in hosts.items() if slots}
        if not hosts:
            raise UserError(f"{flag} {request.text(flag)}: leaves no rank to start")
    nodes, ranks = request.number("--num_nodes"), request.number("--num_gpus")
    if nodes is not None:
        if nodes > len(hosts):
            mend = "add hosts to it, or" if "--hostfile" in request.launcher else "name a --hostfile, or"
            raise UserError(f"--num_nodes is {nodes}, but only {', '.join(hosts)} is there: {mend} use fewer nodes")
        hosts = dict(list(hosts.items())[:nodes])
    if ranks is not None:
        for host in hosts:
            if ranks > pool[host]:
                raise UserError(f"--num_gpus is {ranks}, but {host} has {pool[host]} {what}: start fewer ranks")
        hosts = {host: list(range(ranks)) for host in hosts}
    return hosts


def plan(request: Request, machine: Machine) -> Launch:
    """Lays the ranks out and checks that they can start. Raises UserError."""
    gpus = machine.gpus()
    environment: dict[str, str | None] = {}
    if gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    if "--bind_cores_to_rank" in request.launcher and not machine.has_command("numactl"):
        raise UserError("--bind_cores_to_rank: numactl is not installed: install it, or leave the flag out")

    flags = {flag: value for flag, value in request.launcher.items() if flag != "--module"}
    if "--hostfile" in request.launcher:
        hosts = _plan_hosts(request, machine, gpus, flags)
    else:
        hosts = _plan_local(request, machine, gpus, flags, environment)
    if "--quiet" not in flags:
        flags.setdefault("--log_level", "error")  # its INFO lines would bury the run's own
    if "OMP_NUM_THREADS" not in machine.environment:
        ranks = max(len(slots) for slots in hosts.values())
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cores() // ranks))
    words = tuple(flag if value is None else f"{flag}={value}" for flag, value in flags.items())
    return Launch(request, words, environment, hosts, gpus)


def _plan_local(
    request: Request, machine: Machine, gpus: int, flags: dict[str, str | None], environment: dict[str, str | None]
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


def _plan_hosts(request: Request, machine: Machine, gpus: int, flags: dict[str, str | None]) -> dict[str, list[int]]:
    """Ranks on the hosts of a hostfile; completes `flags`."""
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
        return hosts
    if len(hosts) == 1 and local and "--force_multi" not in flags:
        # One host, this one: nothing to reach by ssh.
        flags["--no_ssh_check"] = None
        flags.setdefault("--master_addr", "127.0.0.1")
        _settle_port(request, machine, flags)
        return hosts
    # Without it DeepSpeed starts the ranks of a single remote host on this machine.
    flags["--force_multi"] = None
    if first in local:
        _check_port(request, machine)
    launcher = (request.text("--launcher") or "pdsh").lower()
    by_hand = "start every node by itself with --no_ssh --node_rank N --master_addr HOST"
    command = MULTI_NODE_COMMANDS[launcher]
    if not machine.has_command(command):
        raise UserError(f"--launcher {launcher}: {command} is not installed: install it, or {by_hand}")
    for flag in ("--include", "--exclude", "--num_nodes", "--num_gpus"):
        if flag in flags and launcher in ("openmpi", "mpich", "impi", "mvapich"):
            raise UserError(f"--launcher {launcher} does not go with {flag}: name the slots in {path} instead")
    if "--no_ssh_check" not in flags:
        unreachable = machine.unreachable(list(hosts), request.number("--ssh_port"))
        if unreachable:
            raise UserError(
                f"--hostfile {path}: no ssh without a password to {', '.join(unreachable)}: set up keys, or {by_hand}"
            )
    return hosts


def _settle_port(request: Request, machine: Machine, flags: dict[str, str | None]) -> None:
    """The rendezvous port of a single node: the one that was asked for, or any free one.

    Not the same one every time: two runs that start together on one machine must not meet.
    """
    if "--master_port" in flags:
        _check_port(request, machine)
    else:
        flags["--master_port"] = str(machine.free_port())


def _check_port(request: Request, machine: Machine) -> None:
    port = request.number("--master_port") or DEFAULT_PORT
    problem = machine.port_problem(port)
    if problem:
        raise UserError(f"--master_port: port {port} cannot be used on this machine ({problem}): give another one")


def main(words: Sequence[str]) -> NoReturn:
    """Checks, then becomes the launcher; exits with code 2 and one line when something is wrong."""
    try:
        request = split(words)
        if {"--help", "-h"} & set(request.recipe_flags):
            command = [sys.executable, "-m", "pipeline", "train", *request.run]
            os.execv(command[0], command)
        machine = Machine(os.environ)
        launch = plan(request, machine)
    except UserError as error:
        print(f"launch.sh: {error}", file=sys.stderr)
        sys.exit(2)
    if not launch.gpus and machine.idle_gpus():
        warning = "torch cannot use the NVIDIA GPUs of this machine, so the ranks run on the CPU: see `mnemos doctor`"
        print(f"launch.sh: warning: {warning}", file=sys.stderr)
    environment = {name: value for name, value in os.environ.items() if name not in launch.environment}
    environment.update({name: value for name, value in launch.environment.items() if value is not None})
    check = subprocess.run(launch.check_command(), env=environment, check=False)
    if check.returncode:
        sys.exit(check.returncode)
    command = launch.command()
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
