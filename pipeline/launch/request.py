"""The words after `./launch.sh`: launcher flags, RECIPE, recipe flags."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError

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


@dataclass(frozen=True)
class Request:
    """What was typed. Launcher flags are under their long names; a switch has the value None."""

    launcher: dict[str, str | None]
    recipe: str | None
    """None when a `--config`, a run's config.yaml, names it."""
    recipe_flags: tuple[str, ...]

    @property
    def run(self) -> list[str]:
        return [*([] if self.recipe is None else [self.recipe]), *self.recipe_flags]

    def text(self, flag: str) -> str:
        return self.launcher.get(flag) or ""

    def number(self, flag: str) -> int | None:
        return int(self.text(flag)) if flag in self.launcher else None


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
