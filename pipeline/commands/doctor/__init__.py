"""`doctor`: what this machine has, and what is wrong with it.

command.py    the command: a table, and a file on demand
report.py     everything that is shown, ready for JSON
host.py       processor, memory, GPUs, compilers, packages
backends.py   attention backends and native kernels
problems.py   the warnings
table.py      the report for a person
"""

from pipeline.commands.doctor.command import run_doctor
from pipeline.commands.doctor.report import collect
from pipeline.commands.doctor.table import render

__all__ = ["collect", "render", "run_doctor"]
