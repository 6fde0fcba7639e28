"""What launch.sh runs: checks, then supervises the launcher; exits with code 2 and one line when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from pipeline.commands.flags import wants_help
from pipeline.errors import UserError
from pipeline.host.local import LocalHost
from pipeline.launch.layout import lay_out
from pipeline.launch.request import split


def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        request = split(words)
        if wants_help(request.recipe_flags):
            command = [sys.executable, "-m", "pipeline", "train", *request.run]
            os.execv(command[0], command)
        machine = LocalHost(os.environ)
        launch = lay_out(request, machine)
    except UserError as error:
        print(f"launch.sh: {error}", file=sys.stderr)
        return 2
    warnings = launch.warnings()
    if not launch.gpus and machine.idle_gpus():
        unused = "torch cannot use the NVIDIA GPUs of this machine, so the ranks run on the CPU"
        warnings.append(f"{unused}: see `mnemos doctor`")
    for warning in warnings:
        print(f"launch.sh: warning: {warning}", file=sys.stderr)
    environment = {name: value for name, value in os.environ.items() if name not in launch.environment}
    environment.update({name: value for name, value in launch.environment.items() if value is not None})
    try:
        check = subprocess.run(launch.check_command(), env=environment, check=False)
        if check.returncode:
            return check.returncode if check.returncode > 0 else 128 - check.returncode
    except KeyboardInterrupt:
        return 130
    from pipeline.launch.supervise import supervise

    return supervise(launch, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
