"""Hostfiles, and which of their slots a launch takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError, brief, shown
from pipeline.launch.request import Request

HOST_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})\s*(#.*)?")


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
    # At the line ends that DeepSpeed splits at, which reads the file as well.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = HOSTFILE_LINE.fullmatch(line)
        if not match:
            raise UserError(
                f"--hostfile {path}, line {number}: {shown(line)} is not `HOST slots=N`: give a host, a space,"
                " slots= and the number of its GPUs"
            )
        host, slots = match[1], int(match[2])
        # Host names end up in ssh and shell commands: one that starts with a hyphen would be an option there.
        if not HOST_NAME.fullmatch(host):
            raise UserError(f"--hostfile {path}, line {number}: {shown(host)} is not a host name: {_name_fix(host)}")
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


def _name_fix(host: str) -> str:
    """What to write in place of a word that is no host name."""
    user, at, name = host.rpartition("@")
    if at and HOST_NAME.fullmatch(name):
        # DeepSpeed and pdsh would take it, but --include and --exclude separate hosts by @.
        return f"write {name} alone, and its user in ~/.ssh/config (Host {name}, User {brief(user, 40)})"
    if host.startswith("\ufeff"):
        return "save the file without a byte order mark"
    if ":" in host:
        return "leave the port out and give --ssh_port; name an IPv6 address in ~/.ssh/config or /etc/hosts"
    return "give letters, digits, dots, hyphens and underscores"


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
            fix = "add hosts to it, or" if "--hostfile" in request.launcher else "name a --hostfile, or"
            raise UserError(f"--num_nodes is {nodes}, but only {', '.join(hosts)} is there: {fix} use fewer nodes")
        hosts = dict(list(hosts.items())[:nodes])
    if ranks is not None:
        for host in hosts:
            if ranks > pool[host]:
                raise UserError(f"--num_gpus is {ranks}, but {host} has {pool[host]} {what}: start fewer ranks")
        hosts = {host: list(range(ranks)) for host in hosts}
    return hosts
