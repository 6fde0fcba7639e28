"""What reaches other nodes through a shell: environment variables and the words of the recipe.

DeepSpeed writes both into a command line that ssh gives to a shell, and quotes only some of it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UserError

BY_DEEPSPEED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
"""Beginnings of the variables that DeepSpeed passes on by itself."""
PREFIXES = ("GLOO_", "MNEMOS_", "PYTORCH_", "TORCH_")
NAMES = ("DS_ACCELERATOR", "HF_HOME", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PATH")
"""Variables that a rank needs wherever it runs, and that ssh does not bring along."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SPECIAL = re.compile(r"[\"'$`\\\x00-\x1f\x7f]")
"""Characters that end the quotes which DeepSpeed puts around a value, or are expanded inside them."""
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")
"""Values that DeepSpeed does not quote: where there is no shell, its quotes would become part of the value."""
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""Ends the ssh session to a node that is cut off, after a minute."""


def read_environment_files(environment: Mapping[str, str], launcher: str) -> dict[str, str]:
    """The variables of the user's `.deepspeed_env` files, the last one first in rank. Raises UserError."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for folder in (os.path.expanduser("~"), "."):
        path = Path(folder, name)
        if path.is_file():
            found.update(_read(path, launcher))
    return found


def _read(path: Path, launcher: str) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a file of NAME=VALUE lines") from None
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        where = f"{path}, line {number}"
        if not equals or not NAME.fullmatch(name):
            raise UserError(f"{where}: not NAME=VALUE, with a name of letters, digits and underscores")
        _check(f"{where}: {name}", value, launcher)
        found[name] = value
    return found


def _check(what: str, value: str, launcher: str) -> None:
    if launcher == "pdsh":
        wrong = SPECIAL.search(value)
    else:
        wrong = None if PLAIN.fullmatch(value) else re.search(r"[^A-Za-z0-9_@%+=:,./-]", value)
    if wrong:
        raise UserError(f"{what} has {wrong[0]!r}, which the shells of the other nodes would act on: leave it out")


def exports(environment: Mapping[str, str], launcher: str) -> dict[str, str]:
    """The variables for a `.deepspeed_env` of this launch: the user's own files, and what ranks need besides.

    Raises UserError.
    """
    found = {}
    for name, value in environment.items():
        if name.startswith(BY_DEEPSPEED):
            _check(f"the environment variable {name}", value, launcher)
            # DeepSpeed puts the current folder in front of PYTHONPATH, and leaves the rest as it is.
            if name != "PYTHONPATH":
                found[name] = value
        elif name.startswith(PREFIXES) or name in NAMES:
            _check(f"the environment variable {name}", value, launcher)
            found[name] = value
    found.update(read_environment_files(environment, launcher))
    return found


def secrets(names: Iterable[str]) -> list[str]:
    """Names that look like those of secrets."""
    return sorted(name for name in names if SECRET.search(name))


def environment_file(variables: Mapping[str, str], launcher: str) -> str:
    """The text of a `.deepspeed_env`."""
    # pdsh expands %h, %n and %u anywhere in a command.
    per_cent = "%%" if launcher == "pdsh" else "%"
    return "".join(f"{name}={value.replace('%', per_cent)}\n" for name, value in variables.items())


def quoted(word: str) -> str:
    """A word such that DeepSpeed's pdsh command line brings it through the other node's shell as it is."""
    word = word.replace("%", "%%")
    if " " not in word:
        return shlex.quote(word)
    # DeepSpeed puts such a word in double quotes and escapes those inside, and nothing else.
    return re.sub(r"([\\$`])", r"\\\1", word)


def check_plain(what: str, text: str, fix: str) -> None:
    """Raises UserError for what DeepSpeed writes into the other nodes' command line without quotes."""
    if not PLAIN.fullmatch(text) or "%" in text:
        raise UserError(f"{what} is {text!r}, which the shells of the other nodes would take apart: {fix}")


PDSH_SSH_ARGS = "-a -x %h"
"""What pdsh gives to ssh. Some builds add the local user's name, against which `User` in ~/.ssh/config counts nothing;
all of them add one that a launcher's flags name."""


def ssh_options(environment: Mapping[str, str]) -> str:
    """PDSH_SSH_ARGS_APPEND with a limit to the silence of a node; ssh takes the first of two values, so the user's."""
    given = environment.get("PDSH_SSH_ARGS_APPEND", "")
    return f"{given} {KEEP_ALIVE}".strip()
